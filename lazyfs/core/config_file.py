"""Reads the text of a configuration file, and writes it.

    text --parse--> {dest: value} --settle, with the command line--> Settings --render--> text

`parse` reads what `render` writes back as the same values.
"""

import difflib
import enum
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lazyfs import errors
from lazyfs.core.config_key import OCTAL, Key
from lazyfs.core.escaping import one_line

_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
"""How tomllib ends its messages (Lib/tomllib/_parser.py, suffixed_err)."""

_TYPES = {
    bool: "true or false",
    str: "a text",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "a table",
}

COMMENT_COLUMN = 44


class Origin(enum.Enum):
    """Says where a value came from."""

    DEFAULT = "default"
    FILE = "file"
    COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Setting:
    """Holds the value of a key that is in effect."""

    key: Key
    value: object
    origin: Origin


def parse(text: str, keys: Sequence[Key], file: str) -> dict[str, object]:
    """Return the values that a file gives, by the destination of their options.

    Args:
        text: the content of the file.
        keys: the keys that the file may have.
        file: the path of the file, for messages.

    Raises:
        WrongConfiguration: the file is not TOML, or a key or its value is wrong.
    """
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise errors.WrongConfiguration(file, "", "is nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number with more digits than int() takes
        raise _not_toml(file, str(error), text) from error
    known = {key.name: key for key in keys}
    values = {}
    for name, value in table.items():
        if name not in known:
            raise errors.WrongConfiguration(
                file, _quoted(name), f"there is no such key{_instead(name, list(known))}"
            )
        key = known[name]
        try:
            values[key.dest] = _value(key, value)
        except ValueError as error:
            raise errors.WrongConfiguration(file, name, str(error)) from error
    return values


def _not_toml(file: str, message: str, text: str) -> errors.WrongConfiguration:
    place = _PLACE.search(message)
    message = message[: place.start()] if place else message
    line = place[1] if place and place[1] else str(text.rstrip("\n").count("\n") + 1)
    column = f" (column {place[2]})" if place and place[2] else ""
    return errors.WrongConfiguration(file, f"line {line}", f"not TOML: {message}{column}")


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _instead(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.replace("_", "-"), known, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def _value(key: Key, value: object) -> object:
    if key.is_flag:
        if not isinstance(value, bool):
            raise ValueError(f"{_said(value)} is given; allowed is {key.allowed}")
        return value
    if not key.is_list:
        return key.parse(_text(key, value))
    if isinstance(value, list):
        return [key.parse(_text(key, item)) for item in value]
    raise ValueError(f"{_said(value)} is given; allowed is {key.allowed}")


def _text(key: Key, value: object) -> str:
    """Return the value as it would be written on the command line."""
    if isinstance(value, str):
        return value
    if key.takes_numbers and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return str(value)
        except ValueError:  # the number has more digits than Python writes by default
            raise ValueError("the number is too large") from None
    raise ValueError(f"{_said(value)} is given; allowed is {key.allowed}")


def _said(value: object) -> str:
    return _TYPES.get(type(value), "a date or time")


def settle(
    keys: Sequence[Key], from_file: Mapping[str, object], given: Mapping[str, object]
) -> tuple[Setting, ...]:
    """Return the value of each key that is in effect.

    It is the value from the command line, else the value from the file, else the default.
    """
    layers = ((Origin.COMMAND_LINE, given), (Origin.FILE, from_file))
    return tuple(
        next(
            (
                Setting(key, layer[key.dest], origin)
                for origin, layer in layers
                if key.dest in layer
            ),
            Setting(key, key.default, Origin.DEFAULT),
        )
        for key in keys
    )


def plain(setting: Setting) -> object:
    """Return a value as TOML and JSON have it, or None if it is not set.

    It is a string, a number, a boolean or a list.
    """
    if setting.key.metavar == OCTAL and isinstance(setting.value, int):
        return f"{setting.value:04o}"
    return setting.value


def render(settings: Sequence[Setting], file: str | None) -> str:
    """Return the configuration as TOML. A comment on each key says where its value came from.

    Args:
        settings: every key, once.
        file: the path of the file, for values that came from it.
    """
    lines = []
    for setting in settings:
        name, value = setting.key.name, plain(setting)
        text = None if value is None else _toml(value)
        origin = setting.origin.value
        if setting.origin is Origin.FILE:
            origin = f"{one_line(file or '')}: {name}"
        if value is None:
            lines.append(f"{f'# {name} is not set':<{COMMENT_COLUMN}}  # {origin}")
        elif text is None:
            lines.append(
                f"{f'# {name} is not UTF-8, which TOML cannot say':<{COMMENT_COLUMN}}  # {origin}"
            )
        else:
            lines.append(f"{f'{name} = {text}':<{COMMENT_COLUMN}}  # {origin}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str | None:
    """Return a value in TOML, or None if TOML cannot express it."""
    if isinstance(value, list | tuple):
        items = [_toml(item) for item in value]
        return (
            None if None in items else f"[{', '.join(item for item in items if item is not None)}]"
        )
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    # A basic string of TOML is written like a string of JSON, except that JSON does not escape DEL.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return text if _is_unicode(text) else None


def _is_unicode(text: str) -> bool:
    """Return whether there are no surrogates in `text`.

    They stand for bytes of a file name that are not UTF-8 (PEP 383).
    """
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def table(keys: Sequence[Key]) -> str:
    """Return all keys as a table for doc/CONFIGURATION.md."""
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key in keys:
        meaning, default = key.meaning, "not set"
        if in_help := re.search(r" ?\(default: (.*?)\)", meaning):
            meaning, default = meaning.replace(in_help[0], ""), in_help[1]
        elif key.is_flag or key.choices:
            meaning, default = meaning.replace(" (default)", ""), f"{_toml(key.default)}"
        elif key.required:
            default = "required"
        rows.append(
            f"| `{key.name}` | {_cell(key.allowed)} | {_cell(default)} | {_cell(meaning)} |"
        )
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    """Return `text` for a cell of a Markdown table, in which "|" would begin the next cell."""
    return text.replace("|", "\\|")
