"""Makes the keys of a configuration file from the options of `lazyfs mount`.

So there is no second list. A key is the long name of the option without the dashes in front, or the
name of a positional argument. The option decides which values the key can have:

    option                          value in the file
    a flag (takes no value)         true or false
    may be given several times      a list
    has choices, or no type         a string
    metavar OCTAL                   a string, because 444 is not the mode 0444
    any other type                  a string as on the command line, or a number
    metavar DIR, FILE, MOUNTPOINT   a string with an absolute path, because a file has no
                                    current folder
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass

PATHS = ("DIR", "FILE", "MOUNTPOINT")
OCTAL = "OCTAL"


@dataclass(frozen=True, slots=True)
class Key:
    """Describes one key of a configuration file."""

    name: str
    """The key as it is written in the file."""
    dest: str
    """The destination of the option in argparse's namespace."""
    meaning: str
    metavar: str
    default: object
    convert: Callable[[str], object] | None = None
    """The type of the option. It raises argparse.ArgumentTypeError or ValueError."""
    choices: tuple[str, ...] = ()
    is_flag: bool = False
    is_list: bool = False
    required: bool = False
    """True if the file must have it when the command line does not, because it is a positional
    argument."""

    @property
    def takes_numbers(self) -> bool:
        """True if the file may have a number instead of a text."""
        return self.convert is not None and self.metavar not in (OCTAL, "REPOSITORY")

    @property
    def is_path(self) -> bool:
        """True if the value names a file or a folder."""
        return self.metavar in PATHS

    @property
    def allowed(self) -> str:
        """The values that the key can have, in words, for messages and documents."""
        if self.is_flag:
            return "true or false"
        if self.choices:
            one = " or ".join(f'"{choice}"' for choice in self.choices)
        elif self.is_path:
            one = "an absolute path in quotes"
        elif self.metavar == OCTAL:
            one = 'an octal number in quotes, such as "0444"'
        else:
            one = (
                f"{self.metavar}, a number or a text in quotes"
                if self.takes_numbers
                else "a text in quotes"
            )
        return f"a list, each item {one}" if self.is_list else one

    def parse(self, text: str) -> object:
        """Return the value of one text, as the command line would.

        Raises:
            ValueError: the text is not allowed. The message says why.
        """
        if "\0" in text:
            raise ValueError("a NUL character is not allowed")
        try:
            value = text if self.convert is None else self.convert(text)
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from error
        if self.choices and value not in self.choices:
            raise ValueError(f"{text!r} is not {self.allowed}")
        if self.is_path and not text.startswith("/"):
            raise ValueError(f"{text!r} is not an absolute path")
        return value


def keys_of(actions: Iterable[argparse.Action]) -> tuple[Key, ...]:
    """Return the keys that the options of `lazyfs mount` give.

    An option that is hidden is for the command line only. So is one that has no default at all
    (argparse.SUPPRESS), such as --help.
    """
    return tuple(
        Key(
            name=_name(action),
            dest=action.dest,
            meaning=(action.help or "").replace("%%", "%"),  # argparse prints it like this
            metavar=str(action.metavar or ""),
            default=action.default,
            convert=action.type if callable(action.type) else None,
            choices=tuple(action.choices or ()),
            is_flag=action.nargs == 0,
            is_list=isinstance(action, argparse._AppendAction) or action.nargs in ("*", "+"),
            required=not action.option_strings,
        )
        for action in actions
        if argparse.SUPPRESS not in (action.help, action.default)
    )


def _name(action: argparse.Action) -> str:
    return (
        max(action.option_strings, key=len).removeprefix("--")
        if action.option_strings
        else action.dest
    )
