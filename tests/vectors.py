"""The vectors of `tests/vectors/*.json`, made by a second implementation (`generate.mjs`, ethers), as Python objects."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.core import token as rules
from agent.core.token import Ack, Domain
from agent.core.units import Address, SessionId, Token

FOLDER = Path(__file__).parent / "vectors"
FILES = tuple(sorted(file.stem for file in FOLDER.glob("*.json")))


def unhex(text):
    """Bytes of 0x and hex."""
    assert text.startswith("0x"), text
    return bytes.fromhex(text[2:])


def vectors(name):
    """The vectors of one file."""
    return json.loads((FOLDER / f"{name}.json").read_text())["vectors"]


def each(name):
    """A test for each vector of a file, by its name."""
    return pytest.mark.parametrize("vector", [pytest.param(one, id=one["name"]) for one in vectors(name)])


_told = json.loads((FOLDER / "receipts.json").read_text())["market"]
DOMAIN = Domain(_told["chainId"], Address(unhex(_told["contract"])))
CONSUMER, PROVIDER, OPERATOR, SESSION_KEY = (
    Address(unhex(_told[who])) for who in ("consumer", "provider", "operator", "sessionKey")
)
METER_KEY = unhex(_told["meterKey"])
SESSION_ID = SessionId(unhex(_told["sessionId"]))
AUCTION_NONCE, ENERGY_WH = _told["auctionNonce"], _told["energyWh"]


def ack_of(vector, **changes):
    """The `Ack` of a receipt vector."""
    told = vector["ack"]
    fields = {
        "token": Token(unhex(told["token"])),
        "session_key": Address(unhex(told["sessionKey"])),
        "max_energy_wh": int(told["maxEnergyWh"]),
        "valid_until_s": int(told["validUntil"]),
        "challenge": unhex(told["challenge"]),
        "grant_signature": unhex(told["grantSignature"]),
        "receipt_signature": unhex(told["receiptSignature"]),
    }
    return Ack(**(fields | changes))


def grant_of(vector):
    """The `PresentToken` of a presentation vector."""
    return rules.PresentToken(
        Token(unhex(vector["token"])),
        SessionId(unhex(vector["sessionId"])),
        Address(unhex(vector["provider"])),
        Address(unhex(vector["sessionKey"])),
        vector["maxEnergyWh"],
        vector["validUntil"],
        unhex(vector["challenge"]),
    )


def generated(folder):
    """Make them anew in this folder; skips where node or ethers is missing, and says so."""
    node = shutil.which("node")
    if node is None or not (FOLDER.parent / "node_modules/ethers").is_dir():
        pytest.skip("node or ethers is missing: `npm ci` in tests/, or `./run test`")
    subprocess.run([node, FOLDER / "generate.mjs", folder], check=True, timeout=50)
    return {file.stem: file.read_text() for file in Path(folder).glob("*.json")}
