"""THE EVENING. A market in a box: chain, broker and story on one machine. Only the command line imports it.

* `devnet`, `eth_methods`, `evm`  an Ethereum node in memory, with throw-away accounts
* `broker`                        an MQTT broker for one machine
"""
