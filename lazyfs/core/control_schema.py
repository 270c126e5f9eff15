"""Every command and event of the control socket: what clients may send, what they get, since when.

The one authority: arguments are validated by it, `query-qmp-schema` tells it, and doc/CONTROL.md is made from it
(tools/make-docs). Names of jobs and their fields follow QEMU (qapi/job.json), messages about
arguments too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lazyfs.core.qmp_wire import CommandError

_TYPES = {"str": str, "int": int, "bool": bool, "list": list}
_EXPECTED = {"str": "string", "int": "integer", "bool": "boolean", "list": "array"}


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a command."""

    name: str
    type: str
    """A key of `_TYPES`."""
    meaning: str
    optional: bool = False
    values: tuple[str, ...] = ()
    """Of a string: those allowed; () for any."""


@dataclass(frozen=True, slots=True)
class Field:
    """One member of what a command returns, or of an event's data."""

    name: str
    type: str
    meaning: str
    optional: bool = False
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """One command."""

    name: str
    meaning: str
    arguments: tuple[Argument, ...] = ()
    returns: tuple[Field, ...] = ()
    """() for an empty object."""
    returns_list: bool = False
    """It returns a list of such objects."""
    errors: tuple[str, ...] = ()
    """When it fails, with class GenericError."""
    since: str = "0.1"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; sent to every client."""

    name: str
    meaning: str
    data: tuple[Field, ...]
    since: str = "0.1"


_NO_IMAGE = "there is no image at `path`"
_PATH = Argument("path", "str", 'the image, relative to the mountpoint, such as "team/debian-12"')
_JOB = Argument("id", "str", "of the job, as `query-jobs` has it")
_NO_JOB = "there is no job with this id"
_PATHS = Argument("path", "str", 'an image, or a folder for all below it, relative to the mountpoint; "" for all')
_COUNT = Field("images", "int", "how many it concerned")

COMMANDS = (
    Command(
        "qmp_capabilities",
        "Ends the negotiation; comes before any other command.",
        (Argument("enable", "list", "capabilities to enable; there are none", optional=True),),
    ),
    Command(
        "query-version",
        "The version of lazyfs, in the shape of QEMU's.",
        returns=(Field("qemu", "object", "major, minor and micro"), Field("package", "str", '"lazyfs"')),
    ),
    Command(
        "query-commands",
        "The names of all commands.",
        returns=(Field("name", "str", "of a command"),),
        returns_list=True,
    ),
    Command(
        "query-qmp-schema",
        "All commands, events, and the types of their arguments, results and data, in the shape of QEMU's.",
        returns=(Field("name", "str", "of the entity"), Field("meta-type", "str", "command, event, object, ...")),
        returns_list=True,
    ),
    Command(
        "query-mount",
        "The daemon and its mount.",
        returns=(
            Field("mountpoint", "str", "absolute"),
            Field("device", "str", '"major:minor" of the mount, as /proc/self/mountinfo has it'),
            Field("cache_dir", "str", "absolute"),
            Field("repository", "str", "its URI"),
            Field("connected", "bool", "whether the latest attempt to reach the repository succeeded"),
            Field("control_socket", "str", "absolute"),
            Field("pid", "int", "of the daemon"),
            Field("reconnects", "int", "connections made again after a loss"),
            Field("metrics", "str", '"host:port" where metrics are served, or ""'),
            Field("detached", "bool", "unmounted; serves files that are still open"),
            Field("passthrough", "bool", "whether the kernel reads whole images by itself"),
            Field("passthrough_trouble", "str", 'why not, or ""'),
            Field(
                "room",
                "object",
                "bytes `total` and `free` of the cache's file system, `used` by the cache; the limits `max_cache` and "
                '`min_free`, null for none; and `message`: why the cache may not grow now, or ""',
            ),
            Field("message", "str", 'what an operator should know, or ""'),
        ),
    ),
    Command(
        "query-images",
        "Images, by path.",
        (Argument("path", "str", "an image or a folder, relative to the mountpoint; all if left out", optional=True),),
        returns=(
            Field("name", "str", "of the export"),
            Field("path", "str", "absolute"),
            Field("inode", "int", "that the path leads to now"),
            Field("size", "int", "bytes of the export; null while not known", nullable=True),
            Field("file_size", "int", "bytes of the file shown; null while not known", nullable=True),
            Field("format", "str", "of the file: raw or qcow2"),
            Field("state", "str", "remote, partial, whole or failed"),
            Field("present_bytes", "int", "data in the cache"),
            Field("zero_bytes", "int", "known to be zeroes; with `present_bytes` the size when whole"),
            Field("fetched_bytes", "int", "demand_bytes + populated_bytes"),
            Field("demand_bytes", "int", "fetched because a reader waited"),
            Field("populated_bytes", "int", "fetched in the background"),
            Field("requests", "int", "read requests sent to the repository"),
            Field("open_count", "int", "files open"),
            Field("replaced", "bool", "its name belongs to another image; it is told of while somebody has it open"),
            Field("fill_rate", "number", "bytes per second, lately"),
            Field("pinned", "bool", "never evicted"),
            Field("last_used_ns", "int", "last open or close, ns since the epoch; 0: never"),
            Field("error", "str", 'what is wrong with it, or ""'),
        ),
        returns_list=True,
        errors=(_NO_IMAGE,),
    ),
    Command(
        "query-jobs",
        "Background work, as QEMU's command of that name. A `populate` job ends with its image whole, and is gone "
        "then; a `verify` job stays, concluded, until it is dismissed.",
        returns=(
            Field(
                "id", "str", 'the path of the image, relative to the mountpoint; of a verify job "verify:" before it'
            ),
            Field("type", "str", "populate or verify"),
            Field(
                "status",
                "str",
                "running, paused (by job-pause), standby (waiting for room or the repository) or concluded",
            ),
            Field("current-progress", "int", "bytes done"),
            Field("total-progress", "int", "bytes in all"),
            Field("error", "str", "why it failed", optional=True),
        ),
        returns_list=True,
    ),
    Command("job-pause", "Pauses a job.", (_JOB,), errors=(_NO_JOB, "it has concluded, or is paused")),
    Command("job-resume", "Resumes a paused job.", (_JOB,), errors=(_NO_JOB, "it is not paused")),
    Command(
        "job-cancel",
        "Ends a job. What a populate job has fetched is kept; `prefetch`, or the next first open of the image, begins "
        "it again.",
        (_JOB,),
        errors=(_NO_JOB, "it has concluded"),
    ),
    Command("job-dismiss", "Forgets a concluded job.", (_JOB,), errors=(_NO_JOB, "it has not concluded")),
    Command(
        "prefetch",
        "Populates images now, without a reader, also where population is off otherwise.",
        (
            _PATHS,
            Argument(
                "format",
                "str",
                "of the file; only for an image of which nothing is cached. Its name changes with it",
                optional=True,
                values=("raw", "qcow2"),
            ),
        ),
        returns=(_COUNT, Field("paths", "list", "relative to the mountpoint; new ones where the format changed")),
        errors=(
            _NO_IMAGE,
            "the repository does not answer",
            "an image has failed",
            "a format is asked for, and something is cached",
        ),
    ),
    Command(
        "set-rate",
        "Limits the population of images, each on top of the mount's own limit; of all together if `path` is empty.",
        (_PATHS, Argument("rate", "int", "bytes per second; 0 for no limit")),
        returns=(_COUNT,),
        errors=(_NO_IMAGE,),
    ),
    Command(
        "evict",
        "Drops what is cached of images. Open files keep theirs until they are closed; the next open begins anew.",
        (_PATHS,),
        returns=(_COUNT,),
        errors=(
            _NO_IMAGE,
            "an image is pinned, or the backing file of an overlay",
            "an image is gone from the repository: `forget` drops the last copy",
        ),
    ),
    Command(
        "pin", "Never evicts these images, nor lets them be evicted.", (_PATHS,), returns=(_COUNT,), errors=(_NO_IMAGE,)
    ),
    Command("unpin", "Undoes `pin`.", (_PATHS,), returns=(_COUNT,), errors=(_NO_IMAGE,)),
    Command(
        "forget",
        "Drops images that are gone from the repository, with what is cached of them.",
        (_PATHS,),
        returns=(_COUNT,),
        errors=(_NO_IMAGE, "an image is in the repository, is pinned or is open"),
    ),
    Command(
        "query-map",
        "Which ranges of an image are here, as `qemu-img map` tells it.",
        (_PATH,),
        returns=(
            Field("start", "int", "byte of the export"),
            Field("length", "int", "bytes"),
            Field("present", "bool", "in the cache, or known to be zeroes"),
            Field("zero", "bool", "reads as zeroes"),
            Field("data", "bool", "data in the cache file"),
        ),
        returns_list=True,
        errors=(_NO_IMAGE, "the size of the image is not known"),
    ),
    Command(
        "verify",
        "Reads back what is cached of an image, as a job; damage drops it, so that it is fetched again when needed.",
        (
            _PATH,
            Argument(
                "digest",
                "str",
                "what the whole export hashes to, such as sha256:9f86...; kept if it is right, or if the image is not "
                "whole: then there is no job, as it is compared before the image is handed off",
                optional=True,
            ),
            Argument("against-repository", "bool", "compare with the repository as well", optional=True),
        ),
        returns=(Field("id", "str", "of the job, which has an error when the cache is damaged", optional=True),),
        errors=(
            _NO_IMAGE,
            "the digest is none",
            "the image is being verified already",
        ),
    ),
    Command(
        "detach",
        "Unmounts lazily: new opens get the plain files, open files are served until they are closed.",
        returns=(Field("open_count", "int", "files that stay open"),),
        errors=("an open image is not whole", "it is detached already"),
    ),
)

EVENTS = (
    Event(
        "JOB_STATUS_CHANGE",
        "A job has begun, changed or gone, as QEMU's event of that name.",
        (Field("id", "str", "of the job"), Field("status", "str", 'as in `query-jobs`, or "null": it is gone')),
    ),
    Event(
        "IMAGE_STATE_CHANGE",
        "An image has another state.",
        (
            Field("path", "str", "relative to the mountpoint"),
            Field("state", "str", "as in `query-images`"),
            Field("error", "str", "as there"),
        ),
    ),
)

EVENT_NAMES = frozenset(event.name for event in EVENTS)


def check_arguments(command: Command, arguments: Mapping[str, Any]) -> None:
    """Compare what a client sent with the schema.

    Raises:
        CommandError: names the argument, in QEMU's words.
    """
    known = {argument.name: argument for argument in command.arguments}
    for name, value in arguments.items():
        argument = known.get(name)
        if argument is None:
            raise CommandError(f"Parameter '{name}' is unexpected")
        _check_value(argument, value)
    for name, argument in known.items():
        if name not in arguments and not argument.optional:
            raise CommandError(f"Parameter '{name}' is missing")


def _check_value(argument: Argument, value: Any) -> None:
    # A bool is an int to Python, not to JSON; an integer has 64 bits to QEMU, any number of them to Python.
    fits = isinstance(value, _TYPES[argument.type])
    if argument.type == "int":
        fits = fits and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if not fits:
        raise CommandError(f"Invalid parameter type for '{argument.name}', expected: {_EXPECTED[argument.type]}")
    if argument.values and value not in argument.values:
        raise CommandError(f"Parameter '{argument.name}' does not accept value '{value}'")


# -- what clients are told of it


def introspection() -> list[dict[str, Any]]:
    """Return what `query-qmp-schema` does (QEMU, qapi/introspect.json)."""
    found: list[dict[str, Any]] = [
        {"name": name, "meta-type": "builtin", "json-type": json_type}
        for name, json_type in {
            "str": "string", "int": "int", "bool": "boolean", "number": "number", "null": "null", "any": "value",
        }.items()
    ]  # fmt: skip
    found.append({"name": "list", "meta-type": "array", "element-type": "any"})
    found.append({"name": "object", "meta-type": "object", "members": []})
    found.append({"name": "int or null", "meta-type": "alternate", "members": [{"type": "int"}, {"type": "null"}]})
    for command in COMMANDS:
        argument_type, return_type = f"{command.name}-arg", f"{command.name}-ret"
        found.append(
            {
                "name": command.name, "meta-type": "command", "allow-oob": False, "arg-type": argument_type,
                "ret-type": f"[{return_type}]" if command.returns_list else return_type,
            }
        )  # fmt: skip
        found += [
            {
                "name": _enum(argument), "meta-type": "enum", "values": list(argument.values),
                "members": [{"name": value} for value in argument.values],
            }
            for argument in command.arguments if argument.values
        ]  # fmt: skip
        found.append(_object(argument_type, command.arguments))
        found.append(_object(return_type, command.returns))
        if command.returns_list:
            found.append({"name": f"[{return_type}]", "meta-type": "array", "element-type": return_type})
    for event in EVENTS:
        found.append({"name": event.name, "meta-type": "event", "arg-type": f"{event.name}-data"})
        found.append(_object(f"{event.name}-data", event.data))
    return found


def _object(name: str, members: tuple[Argument, ...] | tuple[Field, ...]) -> dict[str, Any]:
    listed = []
    for member in members:
        kind = _enum(member) if isinstance(member, Argument) and member.values else member.type
        if isinstance(member, Field) and member.nullable:
            kind += " or null"
        entry: dict[str, Any] = {"name": member.name, "type": kind}
        if member.optional:
            entry["default"] = None
        listed.append(entry)
    return {"name": name, "meta-type": "object", "members": listed}


def _enum(argument: Argument) -> str:
    return " or ".join(argument.values)


def document() -> str:
    """Return doc/CONTROL.md."""
    parts = [_INTRODUCTION, "## Commands\n"]
    parts += [_describe(command) for command in sorted(COMMANDS, key=lambda command: command.name)]
    parts.append("## Events\n")
    for event in sorted(EVENTS, key=lambda event: event.name):
        parts.append(f"### {event.name}\n\n{event.meaning} Since {event.since}.\n\n{_table('data', event.data)}")
    return "\n".join(parts)


_INTRODUCTION = """# The control socket

<!-- Made from lazyfs/core/control_schema.py by tools/make-docs; tests/unit/test_control_schema.py compares. -->

Each daemon listens on a UNIX socket, mode 0600: `/run/lazyfs/<mountpoint, escaped as systemd-escape --path>.sock`, for
users `$XDG_RUNTIME_DIR/lazyfs/` (FORMATS.md has the rest of the name). It speaks QMP as QEMU does, so `qmp-shell` and
the `qemu.qmp` library are clients; so is every verb of `lazyfs`. A message is at most 64 KiB, and there are at most 64
clients. Failures are of class `GenericError`: wrong arguments name the argument. An unknown command, or one before
`qmp_capabilities`, is `CommandNotFound`.

    qmp-shell /run/lazyfs/var-lib-imagecache.sock
    (QEMU) query-images path=debian-12
"""


def _describe(command: Command) -> str:
    parts = [f"### {command.name}\n\n{command.meaning} Since {command.since}.\n"]
    if command.arguments:
        parts.append(_table("argument", command.arguments))
    if command.returns:
        parts.append(_table("returns a list of" if command.returns_list else "returns", command.returns))
    if command.errors:
        parts.append("Fails when: " + "; ".join(command.errors) + ".\n")
    return "\n".join(parts)


def _table(title: str, members: tuple[Argument, ...] | tuple[Field, ...]) -> str:
    rows = [f"| {title} | type | |", "|---|---|---|"]
    for member in members:
        values = getattr(member, "values", ())
        kind = " or ".join(f'"{value}"' for value in values) if values else member.type
        rows.append(f"| `{member.name}`{' (optional)' if member.optional else ''} | {kind} | {member.meaning} |")
    return "\n".join(rows) + "\n"
