"""Identities and conversions. Every conversion has its rounding in its name; quantities are plain `int`s.

NewTypes are for identities only, where a mix-up would be silent bytes for bytes. Bytes inside, 0x-hex at the edges.
"""

from __future__ import annotations

from typing import NewType

Address = NewType("Address", bytes)  # 20 bytes
Token = NewType("Token", bytes)  # 32 bytes; the paper's access token; changes when a reorg re-mines `connect`
SessionId = NewType("SessionId", bytes)  # 32 bytes; reorg-stable (PROTOCOL section 2)
TxHash = NewType("TxHash", bytes)  # 32 bytes
BidId = NewType("BidId", bytes)  # 32 bytes; the same for the same consumer, auction and rate
BlockHash = NewType("BlockHash", bytes)  # 32 bytes

UINT64_MAX = 2**64 - 1
UINT128_MAX = 2**128 - 1
UINT256_MAX = 2**256 - 1

MWH_PER_WH = 1000
WH_PER_KWH = 1000


def cost_wei_floor(rate_wei_per_kwh: int, energy_wh: int) -> int:
    """What is paid for `energy_wh`: floor(rate * Wh / 1000). The contract's rounding when paying (PROTOCOL section 1)."""
    return rate_wei_per_kwh * energy_wh // WH_PER_KWH


def cost_wei_ceil(rate_wei_per_kwh: int, energy_wh: int) -> int:
    """What is locked for `energy_wh`: ceil(rate * Wh / 1000). Equal to the contract's rounding when locking."""
    return -(-rate_wei_per_kwh * energy_wh // WH_PER_KWH)


def energy_wh_floor(energy_mwh: int) -> int:
    """Whole watt hours in `energy_mwh`. The unfinished Wh stays the provider's risk, never the consumer's."""
    return energy_mwh // MWH_PER_WH


def energy_mwh(energy_wh: int) -> int:
    """Exact."""
    return energy_wh * MWH_PER_WH


def energy_mwh_after(power_w: int, duration_ms: int) -> int:
    """Energy that `power_w` moves in `duration_ms`, rounded up: an upper bound for plausibility and credit."""
    return -(-power_w * duration_ms // 3_600)


def short(identity: bytes) -> str:
    """An identity as logs may show it: `0x1234..abcd` (PROTOCOL section 8, privacy)."""
    text = identity.hex()
    return f"0x{text[:4]}..{text[-4:]}" if len(text) > 8 else f"0x{text}"


def hex0x(data: bytes) -> str:
    """Bytes as `0x` + lowercase hex: the one textual form of PROTOCOL's messages and of the journal."""
    return "0x" + data.hex()
