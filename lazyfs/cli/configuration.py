"""Finds and reads configuration files, and prints what `lazyfs config` shows.

core/config_file.py says what may be in a file. An option on the command line has precedence over
the file, and the file has precedence over the defaults.
"""

import argparse
import copy
import json
import os
from collections.abc import Sequence

from lazyfs import errors
from lazyfs.cli import mount_options
from lazyfs.core import config_file
from lazyfs.core.config_key import Key
from lazyfs.core.escaping import one_line

FOLDER = "/etc/lazyfs"
"""The folder in which a configuration is looked for that is given by name."""

MAX_SIZE = 1 << 20
"""The largest accepted file in bytes; nobody writes one so large. The limit keeps
`--config /dev/zero` from using all memory."""


def run(options: argparse.Namespace) -> int:
    """Print what `lazyfs mount` would do with the same options."""
    print(show(options), end="")
    return 0


def path_of(name: str) -> str:
    """Return the path of the configuration file that `name` means.

    A name with a "/" or the suffix ".toml" is a path. Any other name means a file in FOLDER.

    Raises:
        UsageError: the name is empty.
    """
    if not name:
        raise errors.UsageError("the configuration has an empty name; give NAME or FILE.toml")
    return name if "/" in name or name.endswith(".toml") else os.path.join(FOLDER, f"{name}.toml")


def load(path: str, keys: Sequence[Key]) -> dict[str, object]:
    """Return the values that a file gives, by the destination of their options.

    Raises:
        UserError: the file cannot be read.
        WrongConfiguration: the content of the file is wrong.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SIZE + 1)
    except (OSError, ValueError) as error:  # A ValueError means a NUL in the path.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = one_line(path)
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
    """Return a list of the configurations that exist, for a message that `path` does not."""
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


def settings(options: argparse.Namespace) -> tuple[config_file.Setting, ...]:
    """Return the settings that are in effect.

    Args:
        options: the options that were given. `options.config` is the configuration file, or None.

    Raises:
        UserError: the file cannot be read, or its content is wrong.
    """
    keys = mount_options.mount_keys()
    from_file = {} if options.config is None else load(path_of(options.config), keys)
    return config_file.settle(keys, from_file, vars(options))


def without_folder(options: argparse.Namespace) -> argparse.Namespace:
    """Return a copy that means the same in every folder: the daemon leaves the one it began in."""
    copied = copy.copy(options)
    if copied.config is not None:
        copied.config = os.path.abspath(path_of(copied.config))
    for key in mount_options.mount_keys():
        if key.is_path and hasattr(copied, key.dest):
            setattr(copied, key.dest, _absolute(getattr(copied, key.dest)))
    return copied


def apply(options: argparse.Namespace) -> None:
    """Set every key's value that is in effect in `options`.

    `options.chosen` then has those that differ from the default, by the names of their keys, as
    JSON has them.

    Raises:
        UserError: the file cannot be read, or its content is wrong.
        UsageError: neither the file nor the command line says what to mount, or where.
    """
    effective = settings(options)
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
    options.chosen = {
        setting.key.name: _absolute(config_file.plain(setting))
        if setting.key.is_path
        else config_file.plain(setting)
        for setting in effective
        if setting.value != setting.key.default and not setting.key.required
    }


def _absolute(value: object) -> object:
    """Return the absolute path, or paths, which mean the same in every folder."""
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    return os.path.abspath(value) if isinstance(value, str) else value


def show(options: argparse.Namespace) -> str:
    """Return the settings that are in effect, and where each value came from.

    The text is TOML, or JSON with --json.
    """
    effective = settings(options)
    file = None if options.config is None else path_of(options.config)
    if not options.json:
        return config_file.render(effective, file)
    values = {
        setting.key.name: {"value": config_file.plain(setting), "origin": setting.origin.value}
        for setting in effective
    }
    return json.dumps({"file": file, "keys": values}, indent=2) + "\n"
