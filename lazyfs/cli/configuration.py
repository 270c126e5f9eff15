"""Configuration files: finding and reading them, and what `lazyfs config` prints.

What may be in them is in core/config_file.py. Options on the command line win over the file, the file over the
defaults.
"""

import argparse
import json
import os
from collections.abc import Sequence

from lazyfs import errors
from lazyfs.core import config_file
from lazyfs.core.config_key import Key

FOLDER = "/etc/lazyfs"
"""Where a configuration is looked for that is given by name."""

MAX_SIZE = 1 << 20
"""Bytes; nobody writes a file so large. Keeps `--config /dev/zero` from taking all memory."""


def path_of(name: str) -> str:
    """Return the path of a configuration: NAME is in /etc/lazyfs; what has a "/", or ends in ".toml", is a path.

    Raises:
        UsageError: the name is empty.
    """
    if not name:
        raise errors.UsageError("the configuration has an empty name; give NAME or FILE.toml")
    return name if "/" in name or name.endswith(".toml") else os.path.join(FOLDER, f"{name}.toml")


def load(path: str, keys: Sequence[Key]) -> dict[str, object]:
    """Return the values that a file gives, by the destination of their options.

    Raises:
        UserError: it cannot be read.
        WrongConfiguration: what is in it is wrong.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SIZE + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = config_file.printable(path)
        raise errors.UserError(
            f"cannot read the configuration {shown}: {reason}{_others(path)}"
        ) from error
    if len(content) > MAX_SIZE:
        raise errors.WrongConfiguration(path, "", f"is larger than {MAX_SIZE} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise errors.WrongConfiguration(
            path, f"line {line}", "not TOML: this is not UTF-8"
        ) from error
    return config_file.parse(text, keys, path)


def _others(path: str) -> str:
    """Say which configurations there are, if this one is not."""
    if os.path.dirname(path) != FOLDER or os.path.exists(path):
        return ""
    try:
        names = sorted(
            name.removesuffix(".toml") for name in os.listdir(FOLDER) if name.endswith(".toml")
        )
    except OSError:
        names = []
    return (
        f" (there are: {', '.join(names)})"
        if names
        else f" (there is no configuration in {FOLDER})"
    )


def settings(options: argparse.Namespace, keys: Sequence[Key]) -> tuple[config_file.Setting, ...]:
    """Return what is in effect: `options` has those that were given, and in `config` the file or None.

    Raises:
        UserError: the file cannot be read, or is wrong.
    """
    from_file = {} if options.config is None else load(path_of(options.config), keys)
    return config_file.settle(keys, from_file, vars(options))


def apply(options: argparse.Namespace, keys: Sequence[Key]) -> None:
    """Give every key its value in `options`.

    Raises:
        UserError: the file cannot be read, or is wrong.
        UsageError: neither it nor the command line says what to mount, or where.
    """
    effective = settings(options, keys)
    missing = [
        setting.key.metavar
        for setting in effective
        if setting.key.required and setting.value is None
    ]
    if missing:
        where = (
            "the configuration has none"
            if options.config is not None
            else "see lazyfs mount --help, also --config"
        )
        raise errors.UsageError(f"required: {', '.join(missing)} ({where})")
    for setting in effective:
        setattr(options, setting.key.dest, setting.value)


def show(options: argparse.Namespace, keys: Sequence[Key]) -> str:
    """Return the effective configuration, as TOML or with --json as JSON, and where each value came from."""
    effective = settings(options, keys)
    file = None if options.config is None else path_of(options.config)
    if not options.json:
        return config_file.render(effective, file)
    values = {
        setting.key.name: {"value": config_file.plain(setting), "origin": setting.origin.value}
        for setting in effective
    }
    return json.dumps({"file": file, "keys": values}, indent=2) + "\n"
