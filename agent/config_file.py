"""Reading a settings file: TOML, the environment on top, a model that checks, and words for what is wrong.

Rules
* All problems at once, each with its file and line (or environment variable), key, value and nearest valid
  key: an installer repairs a file once, not once per mistake. Then exit 78, and the unit does not
  restart-loop.
* Every setting may be given as `V2V_SECTION__KEY=...` too (a list's entry by its number:
  `V2V_PORTS__0__WIRE`), with the same names and checks; a variable that names no setting is a mistake, never
  ignored.
* What looks like a secret is refused where it stands, and is not shown again in the refusal.

May not know: any particular setting. Stdlib and pydantic only.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from agent.errors import Misconfigured

MAX_FILE_BYTES = 65_536  # a log or a device given by mistake must not be read to its end
ENVIRONMENT_PREFIX = "V2V_"
HIDDEN = "<not shown>"

Key = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class _Problem:
    """One thing to repair: where it stands, what it is called, what it says, and what is wrong with it."""

    where: str
    order: tuple[int, str]  # file lines first, then variables by name
    key: str
    given: str | None
    wrong: str

    def __str__(self) -> str:
        given = "" if self.given is None else f"\n      {self.given}"
        return f"  {self.where}  {self.key}{given}\n      {self.wrong}"


class _Draft:
    """The settings while they are still only data: where each came from, and what is wrong so far."""

    def __init__(self, model: type[BaseModel], path: Path, text: str) -> None:
        self.model = model
        self.path = path
        self.data = _parse(path, text)
        self.lines = dict(_lines(text))
        self.variables: dict[Key, str] = {}
        self.problems: dict[Key, _Problem] = {}

    def override(self, environ: Mapping[str, str]) -> None:
        """Lay `V2V_*` variables over the file; one that names no setting is a problem."""
        for variable in sorted(name for name in environ if name.startswith(ENVIRONMENT_PREFIX)):
            words = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            key: Key = tuple(int(word) if word.isdecimal() else word for word in words)
            self.variables[key] = variable
            if not _put(self.data, key, _toml_value(environ[variable])):
                self.add(key, None, "there is no such table or list entry in the file to override")

    def refuse_secrets(self) -> None:
        """Blank what looks like a key or a password, and say where it belongs."""
        for key, value in list(_leaves(self.data)):
            name = str(key[-1])
            if (name in SECRET_NAMES and name not in _settings_at(self.model, key)) or _is_secret(value):
                _put(self.data, key, "")
                self.add(key, f"{_name(key)} = {HIDDEN}", SECRETS_BELONG)

    def validated(self, model: type[Model]) -> Model | None:
        """The finished settings, or None with `problems` filled."""
        try:
            return model.model_validate(self.data, context={"folder": self.path.absolute().parent})
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                key: Key = detail["loc"]
                if detail["type"] == "too_short" and _get(self.data, key):
                    continue  # its entries are there, but wrong: each has its own line
                self.add(key, self._given(key, detail["type"]), _wrong(self.model, key, dict(detail)))
            return None

    def add(self, key: Key, given: str | None, wrong: str) -> None:
        """Remember a problem; the first one of a key stands (a secret taken out is not also missing)."""
        variable = self._variable(key)
        line = 0 if variable else self._line(key)
        where = variable or (f"{self.path.name}:{line}" if line else self.path.name)
        self.problems.setdefault(
            key, _Problem(where, (int(bool(variable)) * 10**6 + line, where), _dotted(key), given, wrong)
        )

    def _variable(self, key: Key) -> str | None:
        """The variable that set `key` or a table or list around it, or that made the table called so."""
        around = (self.variables[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.variables)
        made = (name for other, name in self.variables.items() if key and other[: len(key)] == key)
        return next(around, None) or (next(made, None) if key not in self.lines else None)

    def _line(self, key: Key) -> int:
        """The line of `key`, else of the nearest table around it."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 0)

    def _given(self, key: Key, kind: str) -> str | None:
        value = _get(self.data, key)
        if kind == "missing" or isinstance(value, dict | list) or not key:
            return None
        return f"{_name(key)} = {_shown(value)}"


def read_settings(model: type[Model], path: Path, environ: Mapping[str, str], *, example: str) -> Model:
    """The settings in `path`, `environ` laid over them, checked by `model`; `example` is named in the remedy.

    The model's validators find the file's folder in their context, as "folder". Raises `Misconfigured` with
    every problem there is.
    """
    draft = _Draft(model, path, _read(path, example))
    draft.override(environ)
    draft.refuse_secrets()
    settings = draft.validated(model)
    if settings is not None and not draft.problems:
        return settings
    problems = sorted(draft.problems.values(), key=lambda problem: problem.order)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise Misconfigured(
        f"{path.name}: {count}, nothing was started\n\n" + "\n".join(map(str, problems)) + "\n",
        remedy=f"next step: correct {path} and run the same command again; {example} explains every setting",
    )


def _read(path: Path, example: str) -> str:
    """The file's text. Raises `Misconfigured` when it is missing, unreadable, huge or no text."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise Misconfigured(
            f"{path}: there is no such file",
            remedy=f"next step: copy {example} there and fill it in",
        ) from None
    except OSError as error:
        raise Misconfigured(
            f"{path}: cannot be read ({error.strerror})", remedy=f"next step: check it with: ls -l {path}"
        ) from None
    if len(content) > MAX_FILE_BYTES:
        raise Misconfigured(
            f"{path}: is larger than {MAX_FILE_BYTES} bytes", remedy="next step: is it the right file?"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Misconfigured(f"{path}: is not UTF-8 text", remedy="next step: is it the right file?") from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    """TOML -> data. Raises `Misconfigured` with line, column and the line itself."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        what = re.sub(r" \(at .*\)$", "", str(error))
        lines = text.splitlines()
        # At the end of the document tomllib names no line.
        line, column = (int(place[1]), int(place[2])) if place else (max(len(lines), 1), 1)
        shown = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        raise Misconfigured(
            f"{path.name}:{line}:{column}: this is not TOML: {what}\n      {_shown_line(shown)}",
            remedy=f'next step: correct {path}; text stands in quotation marks ("left"), numbers do not',
        ) from None


def _lines(text: str) -> Iterator[tuple[Key, int]]:
    """Where each table and key stands. A scan, not a parser: only for pointing at lines."""
    table: Key = ()
    counts: dict[Key, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*(\[\[?)\s*([\w\s.\"'-]+?)\s*\]", line):
            table = _numbered(_words(header[2]), counts)
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
            yield table, number
        elif entry := re.match(r"\s*([\w\s.\"'-]+?)\s*=", line):
            yield (*table, *_words(entry[1])), number


def _words(dotted: str) -> Key:
    return tuple(word.strip().strip("\"'") for word in dotted.split("."))


def _numbered(key: Key, counts: Mapping[Key, int]) -> Key:
    """`ports.meter` means the newest entry of `ports`: put its number in."""
    done: Key = ()
    for word in key[:-1]:
        done = (*done, word)
        if done in counts:
            done = (*done, counts[done])
    return (*done, *key[-1:])


# ------------------------------------------------------------------------------------ explaining a value

SECRET_NAMES = frozenset(
    {"key", "private_key", "secret", "password", "passphrase", "mnemonic", "seed", "seed_phrase"}
)
SECRETS_BELONG = (
    "a secret is not a setting: put it into a systemd credential or a file of mode 0600, and name that here"
)
_LARGEST_NUMBER = 2**200  # an unquoted address is smaller, an unquoted private key is larger
_TYPE_WORDS = {
    "int_type": "must be a whole number",
    "string_type": "must be text in quotation marks",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list in square brackets",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
}


def _is_secret(value: object) -> bool:
    """32 bytes in hex (quoted or not), or 12 to 24 words: nothing else in these files looks like that."""
    if isinstance(value, int):
        return value >= _LARGEST_NUMBER
    if not isinstance(value, str):
        return False
    return bool(re.fullmatch(r"(0x)?[0-9a-fA-F]{64}|[a-z]+( [a-z]+){11,23}", value.strip()))


def _wrong(model: type[BaseModel], key: Key, detail: Mapping[str, Any]) -> str:
    """What pydantic found, in an installer's words."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(str(key[-1]), _settings_at(model, key))
    if kind == "missing":
        return f"is missing ({_settings_at(model, key).get(str(key[-1])) or 'this table is needed'})"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("literal_error", "enum"):
        return f"must be {context['expected']}"
    if kind in ("too_short", "too_long"):
        side, limit = ("least", "min_length") if kind == "too_short" else ("most", "max_length")
        return f"must have at {side} {context[limit]} {'entry' if context[limit] == 1 else 'entries'}"
    if kind in ("string_too_short", "string_too_long", "string_pattern_mismatch"):
        return f"does not fit: {_settings_at(model, key).get(str(key[-1]))}"
    if kind in ("greater_than_equal", "less_than_equal"):
        side, limit = ("least", "ge") if kind == "greater_than_equal" else ("most", "le")
        return f"must be at {side} {context[limit]}"
    return _TYPE_WORDS.get(kind, str(detail["msg"]))


def _unknown(name: str, settings: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, settings, n=1)
    return (
        f'unknown setting - did you mean "{near[0]}"?'
        if near
        else f"unknown setting; there are: {', '.join(settings)}"
    )


def _settings_at(model: type[BaseModel], key: Key) -> dict[str, str]:
    """Name and description of every setting that may stand where `key` stands; empty where none may."""
    here: type[BaseModel] | None = model
    for word in key[:-1]:
        if isinstance(word, str):
            field = here.model_fields.get(word) if here else None
            here = _section_in(field.annotation) if field else None
    return {name: field.description or "" for name, field in here.model_fields.items()} if here else {}


def _section_in(annotation: object) -> type[BaseModel] | None:
    """The section inside `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _name(key: Key) -> str:
    """The last word of `key`, with its entry's number: `urls[1]`."""
    return _dotted(key[-2:] if isinstance(key[-1], int) else key[-1:])


def _dotted(key: Key) -> str:
    return (
        "".join(f"[{word}]" if isinstance(word, int) else f".{word}" for word in key).lstrip(".")
        or "the file as a whole"
    )


def _shown(value: object) -> str:
    """A value as TOML would write it, without what a node's URL may hide after its host."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return str(value)
    hidden = re.sub(r"(://)[^/@]*@", r"\1<not shown>@", value)
    return '"' + re.sub(r"(://[^/]+/)[^/].*", r"\1<not shown>", hidden) + '"'


def _shown_line(line: str) -> str:
    return re.sub(r"(0x)?[0-9a-fA-F]{64}", "<not shown>", line)


# ------------------------------------------------------------------------------------ data in depth


def _toml_value(text: str) -> Any:
    """A variable's text: numbers, booleans, lists and tables as TOML writes them, everything else is text."""
    if not re.match(r"[+-]?\d+$|true$|false$|[\[{\"']", text):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _leaves(data: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    items: Any = (
        data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    )
    if items is None:
        yield key, data
        return
    for word, value in items:
        yield from _leaves(value, (*key, word))


def _get(data: Any, key: Key) -> Any:
    """What stands at `key`: a single value stands for the list it should be in; None for nothing."""
    for word in key:
        if isinstance(data, list) and isinstance(word, int) and word < len(data):
            data = data[word]
        elif isinstance(data, dict):
            data = data.get(word)
    return data


def _put(data: Any, key: Key, value: Any) -> bool:
    """Set `key`, making tables on the way (never list entries). False when something stands in the way."""
    for word in key[:-1]:
        if isinstance(data, dict) and isinstance(word, str):
            data = data.setdefault(word, {})
        elif isinstance(data, list) and isinstance(word, int) and word < len(data):
            data = data[word]
        else:
            return False
    last = key[-1]
    fits = last < len(data) if isinstance(data, list) and isinstance(last, int) else isinstance(data, dict)
    if fits:
        data[last] = value
    return fits
