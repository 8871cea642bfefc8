"""SPEAKS ETHEREUM. The only room that knows web3, JSON-RPC, calldata and fees.

* `contract`  the V2V contract, typed: calldata out, logs in, revert data to names
* `node`      the Node port and the node behind it: blocks, logs, state, hints
* `sender`    fees, nonce, signature, replacement; the only code that sends transactions
* `rpc`, `websocket`  one question, one answer, bounded; web3's WebSocket without its traps

Everything raises `agent.errors` families. What a node says is checked for form here and believed elsewhere.
"""
