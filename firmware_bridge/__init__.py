"""Touches the charger's wire: maps, registers, Modbus, the stop on the Wh. Knows no Ethereum, no sessions, no
agent.
"""
