"""The owner's wishes: every setting of `agent.toml` and `consumer.toml`, with its unit, limits and default.

Rules
* The models below are the only list of settings: the file's checks, the environment's names and the editor's
  schema (config/agent.schema.json) all come from them.
* No secret is a setting. Keys and passwords are *named* here (a systemd credential or a file), for
  `agent.keys`.
* Units are in the names. Relative paths are relative to the file that holds them.

May not know: what a key is, whether a node or a charger answers. Stdlib and pydantic only, because every
command line that starts quickly imports this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from agent.config_file import read_settings

MAX_PORTS = 8  # one session per port; a vehicle has one or two, a depot box a few

# ------------------------------------------------------------------------------------ what a value may be


def _address(value: object) -> bytes:
    """0x and 40 hex digits -> 20 bytes. (The letter case's checksum would need keccak: not for a leaf.)"""
    if isinstance(value, str) and re.fullmatch(r"0x[0-9a-fA-F]{40}", value):
        return bytes.fromhex(value[2:])
    raise ValueError('must be an address in quotation marks: "0x" and 40 hex digits')


def _url(schemes: tuple[str, ...], value: str) -> str:
    """A URL of one of `schemes` with a host and no password in it."""
    allowed = ", ".join(f"{scheme}://" for scheme in schemes)
    try:
        parts = urlsplit(value)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        raise ValueError(f"is not a URL; it should look like {schemes[0]}://host:port") from None
    if parts.scheme not in schemes or not parts.hostname or not port_fits:
        raise ValueError(f"must start with one of {allowed} and name a host")
    if parts.username or parts.password:
        raise ValueError("must not hold a user name or a password; name a credential instead")
    return value


def _listen(value: str) -> str:
    """`host:port`; the host may be a bracketed IPv6 address."""
    if (
        not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}", value)
        or int(value.rpartition(":")[2]) > 65535
    ):
        raise ValueError('must be host:port, for example "127.0.0.1:8465"')
    return value


def _wire(value: str) -> str:
    """Which wire, roughly; `firmware_bridge` knows the rest and checks it against the device's map."""
    if not re.fullmatch(r"(tcp|rtu\+tcp)://\S+|(rtu|rapi):///\S+", value):
        raise ValueError(
            "must be tcp://host:port, rtu+tcp://host:port, rtu:///dev/serial/by-id/... or rapi:///dev/..."
        )
    return value


def _finality(value: object) -> Literal["finalized"] | int:
    """`"finalized"` where the chain says so itself, else a depth in blocks."""
    if value == "finalized":
        return "finalized"
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 10_000:
        return value
    raise ValueError('must be "finalized", or a number of blocks from 1 to 10000')


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _folder(info: ValidationInfo) -> Path:
    return info.context["folder"] if info.context else Path()


def _path(value: object, info: ValidationInfo) -> Path:
    """Relative to the file that names it, so that the caller's directory never matters."""
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError("must be a path in quotation marks")
    return _folder(info) / Path(value).expanduser()


def _source(value: str, info: ValidationInfo) -> str:
    """With a slash: a file, relative to the configuration. Without one: the name of a systemd credential."""
    if "/" in value:
        return str(_path(value, info))
    if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value):
        return value
    raise ValueError("must name a systemd credential, or a file by a path with a slash (./operator.json)")


Address = Annotated[
    bytes,
    PlainValidator(_address),
    WithJsonSchema({"type": "string", "pattern": "^0x[0-9a-fA-F]{40}$"}),
]
Url = Annotated[str, AfterValidator(partial(_url, ("ws", "wss", "http", "https")))]
BrokerUrl = Annotated[str, AfterValidator(partial(_url, ("mqtt", "mqtts")))]
DoorUrl = Annotated[str, AfterValidator(partial(_url, ("http", "https")))]
Listen = Annotated[str, AfterValidator(_listen)]
Wire = Annotated[str, AfterValidator(_wire)]
Finality = Annotated[
    Literal["finalized"] | int,
    PlainValidator(_finality),
    WithJsonSchema({"anyOf": [{"const": "finalized"}, {"type": "integer", "minimum": 1, "maximum": 10_000}]}),
]
FilePath = Annotated[Path, PlainValidator(_path), WithJsonSchema({"type": "string"})]
Source = Annotated[str, AfterValidator(_source)]


class Section(BaseModel):
    """One table of the file. Strict: 300 is not "300", true is not 1; unknown keys are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


# ------------------------------------------------------------------------------------ tables of both sides


class ChainConfig(Section):
    """[chain] Which market we are part of, and when we believe what its chain says."""

    urls: Annotated[tuple[Url, ...], BeforeValidator(_one_or_more)] = Field(
        strict=False,
        min_length=1,
        max_length=4,
        description="Nodes, the preferred one first, the next when it fails: ws(s)://, or http(s):// for requests only",
    )
    chain_id: int = Field(ge=1, description="The chain's EIP-155 id; another answer from a node is refused")
    contract: Address = Field(description="The V2VCharging contract; its code is compared with ours at start")
    confirmations: int = Field(3, ge=1, le=64, description="Blocks on top before we believe an event")
    finality: Finality = Field(
        "finalized", description='When the whole order may flow: "finalized", or a depth in blocks'
    )
    max_view_age_s: int = Field(
        60, ge=5, le=600, description="Oldest newest header we energise on: 60 on L1, 20 on L2"
    )
    start_block: int = Field(
        0, ge=0, description="The block the contract was deployed in: nothing before it is read"
    )

    @model_validator(mode="after")
    def _final_is_deeper(self) -> ChainConfig:
        if isinstance(self.finality, int) and self.finality < self.confirmations:
            raise ValueError(
                f"finality = {self.finality} must not be less than confirmations = {self.confirmations}"
            )
        return self


class MqttConfig(Section):
    """[mqtt] The broker that carries messages and telemetry. Without this table there is no MQTT."""

    url: BrokerUrl = Field(description="mqtt://host:port or mqtts://host:port")
    username: str | None = Field(None, min_length=1, max_length=128, description="The broker's name for us")
    password_credential: Source | None = Field(
        None, description="Credential or 0600 file that holds the password"
    )
    authority: FilePath | None = Field(
        None, description="PEM file of who vouches for the broker; without it this computer's own list"
    )
    certificate: FilePath | None = Field(
        None, description="PEM file of our own certificate: its common name is who we are to the broker"
    )
    certificate_key: Source | None = Field(
        None, description="Credential or 0600 file with the certificate's private key (PEM)"
    )
    keepalive_s: int = Field(
        15, ge=2, le=20, description="A silent connection counts as down after 1.5 times this"
    )

    @model_validator(mode="after")
    def _password_has_a_name(self) -> MqttConfig:
        if self.password_credential and not self.username:
            raise ValueError("password_credential needs a username")
        return self

    @model_validator(mode="after")
    def _certificates_are_whole(self) -> MqttConfig:
        if (self.certificate is None) is not (self.certificate_key is None):
            raise ValueError("certificate and certificate_key need each other")
        if not self.tls and (self.authority or self.certificate):
            raise ValueError("authority and certificate need a mqtts:// url")
        return self

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.url.startswith("mqtts:")

    @property
    def host(self) -> str:
        """The broker's host."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The broker's port: 1883, or 8883 with TLS, unless the URL says otherwise."""
        return urlsplit(self.url).port or (8883 if self.tls else 1883)


class JournalConfig(Section):
    """[journal] The append-only memory. A crash loses nothing that was written here."""

    path: FilePath = Field(description="The SQLite file; its folder must exist and belong to us")


class LogConfig(Section):
    """[log] What is said while running."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least that is said")
    format: Literal["auto", "console", "json", "journal"] = Field(
        "auto",
        description="auto: console on a terminal, journald's own fields under systemd, else JSON lines",
    )


# ------------------------------------------------------------------------------------ the provider's side


class ProviderChainConfig(ChainConfig):
    """[chain] The market, and for whom we drive."""

    provider: Address = Field(
        description="The EV's account (EVP); our operator key must be its operator, or its own key"
    )

    @model_validator(mode="after")
    def _can_be_followed(self) -> ProviderChainConfig:
        if not any(url.startswith("ws") for url in self.urls):
            raise ValueError("urls needs a ws:// or wss:// address: events are followed over a WebSocket")
        return self


class ProviderKeysConfig(Section):
    """[keys] Where the two keys are. Never the keys themselves."""

    operator: Source = Field(
        "operator_key", description="Hot key: settles and bids; can never move money out"
    )
    operator_password: Source | None = Field(
        None, description="Where its keystore's password is, if it is a keystore"
    )
    meter: Source = Field("meter_key", description="Signs the meter records (OCMF); a different key")
    meter_password: Source | None = Field(
        None, description="Where its keystore's password is, if it is a keystore"
    )


class MeterConfig(Section):
    """[ports.meter] A separate meter, for chargers that cannot bill."""

    map: str = Field(min_length=1, max_length=64, description="The meter's device map")
    wire: Wire | None = Field(None, description="Its wire; the charger's own unless given")
    device_id: int | None = Field(None, ge=0, le=255, description="Modbus device id; the map's unless given")
    direction: Literal["import", "export"] | None = Field(
        None,
        description="Which of its registers grows while energy is sold; the map's unless wired the other way round",
    )


class PortConfig(Section):
    """[[ports]] One charging port: one plug, one session at a time."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$",
        description="Public name of the port: a-z, 0-9, _ and -, at most 32",
    )
    map: str = Field(min_length=1, max_length=64, description="The device map, by its id (webasto_next)")
    wire: Wire = Field(
        description="tcp://host:port, rtu:///dev/serial/by-id/..., rtu+tcp://host:port, rapi:///dev/..."
    )
    device_id: int | None = Field(None, ge=0, le=255, description="Modbus device id; the map's unless given")
    current_ma_max: int = Field(ge=6_000, le=500_000, description="The installation's limit per mains phase")
    phase_count: Literal[1, 3] = Field(description="Mains phases that are wired")
    failsafe_timeout_s: int = Field(
        5, ge=1, le=15, description="The charger falls to 0 A after this long without us"
    )
    external_cut_off: str | None = Field(
        None, min_length=1, max_length=64, description="By name, where the device has no failsafe of its own"
    )
    cut_off_command: tuple[str, ...] | None = Field(
        None,
        strict=False,
        min_length=1,
        max_length=16,
        description="The program that makes it open, when a stop was not obeyed; words, no shell",
    )
    ev_lag_ms: int = Field(
        4_000, ge=0, le=60_000, description="How late the consumer's car follows a new limit"
    )
    ev_ramp_ma_per_s: int = Field(
        8_000, ge=100, le=500_000, description="How fast it then changes its current"
    )
    poll_interval_ms: int | None = Field(
        None, ge=50, le=5_000, description="Hot poll; the map's unless given"
    )
    commissioning: FilePath | None = Field(
        None, description="The report of `v2v charger commission`, for maps that are not trusted at once"
    )
    meter: MeterConfig | None = None

    def installed(self) -> dict[str, Any]:
        """What a commissioning report is about: whoever changes one of these commissions again."""
        names = ("map", "wire", "device_id", "phase_count", "failsafe_timeout_s", "external_cut_off")
        meter = None if self.meter is None else self.meter.model_dump()
        return {**{name: getattr(self, name) for name in names}, "meter": meter}

    def charger_settings(self) -> dict[str, Any]:
        """What `firmware_bridge` is told about this port, as the fields of its ChargerConfig."""
        more = {"current_ma_max": self.current_ma_max, "cut_off_command": self.cut_off_command or ()}
        return {**self.installed(), **more}


class ProviderPolicyConfig(Section):
    """[policy] How much we trust, and how long we wait. The defaults are the protocol's."""

    max_unacked_wh: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Energy we deliver ahead of receipts; by default max(50 Wh, power x 15 s)",
    )
    max_unfinal_wh: int = Field(2_000, ge=0, description="Most that flows before `Connected` is final")
    validity_margin_s: int = Field(60, ge=0, le=3_600, description="We stop this long before the token ends")
    final_receipt_wait_s: int = Field(
        20, ge=0, le=600, description="After a stop, how long we wait for the last receipt"
    )
    receipt_timeout_s: int = Field(
        120, ge=5, le=3_600, description="Paused this long without a receipt: stop and settle"
    )
    stop_deadline_s: int = Field(
        30, ge=1, le=300, description="Contactor not seen open by then: lock out, settle"
    )
    battery_reserve_permille: int = Field(
        200, ge=0, le=1_000, description="Charge the owner keeps for driving"
    )
    battery_budget_wh: int | None = Field(
        None, ge=1, description="Most that one session takes, where no device shows the battery's charge"
    )

    def max_unacked_wh_at(self, power_w: int) -> int:
        """The credit at `power_w`: as configured, else max(50 Wh, power x 15 s) (PROTOCOL section 5)."""
        return self.max_unacked_wh if self.max_unacked_wh is not None else max(50, power_w * 15 // 3_600)


class HttpConfig(Section):
    """[http] The local page, the door over HTTP, and /metrics. Loopback unless told otherwise."""

    enabled: bool = True
    listen: Listen = Field(
        "127.0.0.1:8465", description="host:port; a host other than loopback is seen by the network"
    )

    @property
    def host(self) -> str:
        """The address to bind, without brackets."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port to bind; 0 lets the system choose."""
        return int(self.listen.rpartition(":")[2])


class AgentConfig(Section):
    """agent.toml: the provider's daemon."""

    chain: ProviderChainConfig
    keys: ProviderKeysConfig = ProviderKeysConfig()
    ports: tuple[PortConfig, ...] = Field(strict=False, min_length=1, max_length=MAX_PORTS)
    policy: ProviderPolicyConfig = ProviderPolicyConfig()
    mqtt: MqttConfig | None = None
    http: HttpConfig = HttpConfig()
    journal: JournalConfig
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _names_differ(self) -> AgentConfig:
        names = [port.name for port in self.ports]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two ports are called {', '.join(twice)}; a consumer must know them apart")
        return self


class _PortsConfig(Section):
    """What of agent.toml stopping needs."""

    model_config = ConfigDict(extra="ignore")
    ports: tuple[PortConfig, ...] = Field(strict=False, min_length=1, max_length=MAX_PORTS)


class InstallationConfig(Section):
    """What of agent.toml commissioning needs: it works before there is a market."""

    model_config = ConfigDict(extra="ignore")
    ports: tuple[PortConfig, ...] = Field(strict=False, min_length=1, max_length=MAX_PORTS)
    keys: ProviderKeysConfig = ProviderKeysConfig()
    journal: JournalConfig


# ------------------------------------------------------------------------------------ the consumer's side


class ConsumerChainConfig(ChainConfig):
    """[chain] The market, and who we are in it."""

    consumer: Address = Field(description="The EV's account (EVC)")


class ConsumerKeysConfig(Section):
    """[keys] Where the account's key is. Never the key itself."""

    account: Source = Field("consumer_key", description="Credential or file of the EVC account's key")
    account_password: Source | None = Field(
        None, description="Where its keystore's password is, if it is a keystore"
    )


class DoorConfig(Section):
    """[http] The provider's local door, where there is no broker between us."""

    url: DoorUrl = Field(description="http://host:port of the provider's car")


class OrderConfig(Section):
    """[order] What we usually buy; every command may say otherwise."""

    energy_wh: int = Field(ge=1, le=1_000_000, description="How much")
    rate_wei_per_kwh_start: int = Field(ge=1, description="The most we pay; bids go down from here")
    bidding_s: int = Field(300, ge=1, le=86_400, description="How long providers may bid")
    token_validity_s: int = Field(7_200, ge=1, le=172_800, description="How long the token then stands")


class ConsumerPolicyConfig(Section):
    """[policy] What our car signs for."""

    tolerance_permille: int = Field(
        50, ge=0, le=200, description="Their meter may differ this much from ours"
    )
    pre_sign_wh: int = Field(
        25,
        ge=0,
        le=10_000,
        description="Signed beyond what our meter, or you, confirm: what a relay could cost",
    )
    own_meter: FilePath | None = Field(
        None,
        description="A file that always holds our car's own counter, in whole Wh; without it you are asked",
    )
    power_w_max: int = Field(
        22_000, ge=1, le=1_000_000, description="More than this cannot have flowed into our car"
    )


class ConsumerConfig(Section):
    """consumer.toml: the other side of the plug."""

    chain: ConsumerChainConfig
    keys: ConsumerKeysConfig = ConsumerKeysConfig()
    order: OrderConfig
    policy: ConsumerPolicyConfig = ConsumerPolicyConfig()
    mqtt: MqttConfig | None = None
    http: DoorConfig | None = None
    journal: JournalConfig
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _has_a_way(self) -> ConsumerConfig:
        if self.mqtt is None and self.http is None:
            raise ValueError("[mqtt] or [http] is needed: there must be a way to the provider")
        return self


# ------------------------------------------------------------------------------------ reading


def load_agent(path: Path, environ: Mapping[str, str]) -> AgentConfig:
    """`agent.toml` with the environment on top. Raises `Misconfigured` with every problem in it."""
    return read_settings(AgentConfig, path, environ, example="config/agent.toml")


SOCKET_NAME = "agent.sock"
SYSTEMD_RUNTIME = Path("/run/v2v-agent")  # config/v2v-agent.service: RuntimeDirectory=


def socket_path(config: AgentConfig, environ: Mapping[str, str]) -> Path:
    """Where the running agent answers its owner: in the runtime directory systemd gave it, else beside its journal and named
    after it, because several cars' journals may share a folder.
    """
    runtime = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(runtime) / SOCKET_NAME if runtime else config.journal.path.with_suffix(".sock")


def socket_found(config: AgentConfig, environ: Mapping[str, str]) -> Path | None:
    """The same, for a command line that knows only the settings: beside the journal, or the service's; None when neither is."""
    for path in (socket_path(config, environ), SYSTEMD_RUNTIME / SOCKET_NAME):
        if path.is_socket():
            return path
    return None


def load_ports(path: Path, environ: Mapping[str, str]) -> tuple[PortConfig, ...]:
    """Only the `[[ports]]` of `agent.toml`: chargers can be stopped whatever is wrong with the rest of it."""
    return read_settings(_PortsConfig, path, environ, example="config/agent.toml").ports


def load_installation(path: Path, environ: Mapping[str, str]) -> InstallationConfig:
    """`[[ports]]`, `[keys]` and `[journal]` of `agent.toml`, whatever the rest of it says."""
    return read_settings(InstallationConfig, path, environ, example="config/agent.toml")


def load_consumer(path: Path, environ: Mapping[str, str]) -> ConsumerConfig:
    """`consumer.toml` with the environment on top. Raises `Misconfigured` with every problem in it."""
    return read_settings(ConsumerConfig, path, environ, example="config/consumer.toml")


def agent_schema() -> dict[str, Any]:
    """JSON Schema of `agent.toml`, for editors that complete TOML; committed as config/agent.schema.json."""
    schema = AgentConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
