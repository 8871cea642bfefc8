"""The other side of the plug: the consumer's car. What it signs (`policy`), what it remembers (`journal`), what it does on
the chain (`market`), how it talks to the provider (`carrier*`, `meeting`), and the whole way from auction to receipt
(`journey`).

May import core, chain, keys, errors, aiomqtt, aiohttp. Never engine, journal, door, runners: it trusts the provider's
software with nothing, so it shares none of it but the words of `agent.core`.
"""
