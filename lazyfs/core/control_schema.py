"""Defines every command and event of the control socket.

It says what clients may send, what they get, and since which version. This is the only authority:
it validates arguments, `query-qmp-schema` returns it, and tools/make-docs makes doc/CONTROL.md from
it. The names of jobs and their fields, and the messages about arguments, follow QEMU
(qapi/job.json).
"""

# Longer than 500 lines: this is one table, the authority on all commands and events.

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lazyfs.core.qmp_wire import CommandError

_TYPES = {"str": str, "int": int, "bool": bool, "list": list}
_EXPECTED = {"str": "string", "int": "integer", "bool": "boolean", "list": "array"}


@dataclass(frozen=True, slots=True)
class Argument:
    """Describes one argument of a command."""

    name: str
    type: str
    """A key of `_TYPES`."""
    meaning: str
    optional: bool = False
    values: tuple[str, ...] = ()
    """The values that a string may have. () means any."""


@dataclass(frozen=True, slots=True)
class Field:
    """Describes one member of what a command returns, or of the data of an event."""

    name: str
    type: str
    meaning: str
    optional: bool = False
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """Describes one command."""

    name: str
    meaning: str
    arguments: tuple[Argument, ...] = ()
    returns: tuple[Field, ...] = ()
    """The members of the object that it returns. () means an empty object."""
    returns_list: bool = False
    """True if it returns a list of such objects."""
    errors: tuple[str, ...] = ()
    """When the command fails, with class GenericError."""
    since: str = "0.1"


@dataclass(frozen=True, slots=True)
class Event:
    """Describes something that happens and is told to every client."""

    name: str
    meaning: str
    data: tuple[Field, ...]
    since: str = "0.1"


_NO_IMAGE = "there is no image at `path`"
_PATH = Argument(
    "path", "str", 'path of the image, relative to the mountpoint, such as "team/debian-12"'
)
_JOB = Argument("id", "str", "id of the job, as `query-jobs` returns it")
_NO_JOB = "there is no job with this id"
_PATHS = Argument(
    "path",
    "str",
    'path of an image, or of a folder for all images below it; relative to the mountpoint; "" for '
    "all",
)
_COUNT = Field("images", "int", "number of images that it concerned")

COMMANDS = (
    Command(
        "qmp_capabilities",
        "Ends the negotiation. A client must send it before any other command.",
        (Argument("enable", "list", "capabilities to enable; lazyfs has none", optional=True),),
    ),
    Command(
        "query-version",
        "Returns the version of lazyfs, in the form that QEMU uses.",
        returns=(
            Field("qemu", "object", "major, minor and micro"),
            Field("package", "str", '"lazyfs"'),
        ),
    ),
    Command(
        "query-commands",
        "Returns the names of all commands.",
        returns=(Field("name", "str", "name of the command"),),
        returns_list=True,
    ),
    Command(
        "query-qmp-schema",
        "Returns all commands and events, with the types of arguments, results and data, in the "
        "form that QEMU uses.",
        returns=(
            Field("name", "str", "name of the entity"),
            Field("meta-type", "str", "command, event, object, ..."),
        ),
        returns_list=True,
    ),
    Command(
        "query-mount",
        "Returns the state of the daemon and of its mount.",
        returns=(
            Field("mountpoint", "str", "absolute path"),
            Field("device", "str", '"major:minor" of the mount, as /proc/self/mountinfo has it'),
            Field("cache_dir", "str", "absolute path"),
            Field("repository", "str", "URI of the repository"),
            Field(
                "connected", "bool", "true if the latest attempt to reach the repository succeeded"
            ),
            Field("control_socket", "str", "absolute path"),
            Field(
                "pid", "int", "process ID of the keeper, which takes signals and outlives daemons"
            ),
            Field("daemon_pid", "int", "process ID of the daemon"),
            Field("restarts", "int", "how many daemons have been replaced since the mount"),
            Field("version", "str", "version of the daemon"),
            Field("upgrade_trouble", "str", 'why the latest upgrade has failed, or ""'),
            Field("reconnects", "int", "number of times that the repository was back after a loss"),
            Field("metrics", "str", '"host:port" where metrics are served; "" if they are not'),
            Field(
                "detached", "bool", "true if it is unmounted and serves files that are still open"
            ),
            Field("passthrough", "bool", "true if the kernel reads whole images by itself"),
            Field("passthrough_trouble", "str", 'why it does not, or ""'),
            Field(
                "room",
                "object",
                "bytes: `total` and `free` of the cache's file system, and `used` by the cache; "
                "the limits `max_cache` and `min_free`, null for none; and `message`: why the "
                'cache may not grow now, or ""',
            ),
            Field("message", "str", 'what an operator should know, or ""'),
            Field(
                "options",
                "object",
                "what was chosen with `lazyfs mount` and differs from the default, by the keys of "
                "a configuration file",
            ),
            Field(
                "rate_limit",
                "int",
                "limit of population, in bytes per second; null for none",
                nullable=True,
            ),
        ),
    ),
    Command(
        "query-images",
        "Returns images, ordered by path.",
        (
            Argument(
                "path",
                "str",
                "path of an image or a folder, relative to the mountpoint; all images if left out",
                optional=True,
            ),
        ),
        returns=(
            Field("name", "str", "name of the export"),
            Field("path", "str", "absolute path of the image"),
            Field("inode", "int", "inode number that the path leads to now"),
            Field(
                "size", "int", "bytes of the export; null while they are not known", nullable=True
            ),
            Field(
                "file_size",
                "int",
                "bytes of the file on the mount; null while they are not known",
                nullable=True,
            ),
            Field("format", "str", "format of the file: raw or qcow2"),
            Field("state", "str", "remote, partial, whole or failed"),
            Field("present_bytes", "int", "bytes of data in the cache"),
            Field(
                "zero_bytes",
                "int",
                "bytes known to be zeroes; when whole, `present_bytes` + `zero_bytes` is `size`",
            ),
            Field("fetched_bytes", "int", "demand_bytes + populated_bytes"),
            Field(
                "sampled_bytes",
                "int",
                "bytes read to compare the cache with the repository, since the daemon started",
            ),
            Field("demand_bytes", "int", "bytes fetched because a reader waited"),
            Field("populated_bytes", "int", "bytes fetched in the background"),
            Field("requests", "int", "number of read requests sent to the repository"),
            Field("open_count", "int", "number of open files"),
            Field(
                "replaced",
                "bool",
                "true if another image has its name now; it is listed while somebody has it open",
            ),
            Field(
                "fill_rate",
                "number",
                "bytes fetched per second while it is populated, on average since the turn before "
                "its latest turn; 0 otherwise",
            ),
            Field(
                "rate_limit",
                "int",
                "limit of its own, in bytes per second; null for none",
                nullable=True,
            ),
            Field("pinned", "bool", "true if it is never evicted"),
            Field(
                "last_used_ns",
                "int",
                "time of the last open or close, in ns since the epoch; 0 for never",
            ),
            Field("error", "str", 'what is wrong with the image, or ""'),
        ),
        returns_list=True,
        errors=(_NO_IMAGE,),
    ),
    Command(
        "query-jobs",
        "Returns background work, as QEMU's command of that name does. A `populate` job ends when "
        "its image is whole, and is gone then. A `verify` job stays, concluded, until it is "
        "dismissed.",
        returns=(
            Field(
                "id",
                "str",
                'path of the image, relative to the mountpoint; for a verify job, "verify:" and '
                "that path",
            ),
            Field("type", "str", "populate or verify"),
            Field(
                "status",
                "str",
                "running, paused (by job-pause), standby (waiting for room or the repository) or "
                "concluded",
            ),
            Field("current-progress", "int", "number of bytes done"),
            Field("total-progress", "int", "number of bytes in all"),
            Field("error", "str", "why it failed or waits", optional=True),
            Field(
                "waits_for",
                "str",
                "what a populate job waits for: resume (it is paused), repository, retry (after a "
                "failure), room, turn (others are being populated); left out if nothing",
                optional=True,
            ),
        ),
        returns_list=True,
    ),
    Command(
        "population-pause",
        "Pauses all population, also of images that come later, until `population-resume`, and "
        "over a restart.",
        (),
    ),
    Command("population-resume", "Undoes `population-pause`. Paused jobs stay paused.", ()),
    Command(
        "job-pause",
        "Pauses a populate job.",
        (_JOB,),
        errors=(_NO_JOB, "it has concluded, or is paused"),
    ),
    Command("job-resume", "Resumes a paused job.", (_JOB,), errors=(_NO_JOB, "it is not paused")),
    Command(
        "job-cancel",
        "Ends a job. What a populate job has fetched is kept. `prefetch`, or the next first open "
        "of the image, begins it again.",
        (_JOB,),
        errors=(_NO_JOB, "it has concluded"),
    ),
    Command(
        "job-dismiss", "Forgets a concluded job.", (_JOB,), errors=(_NO_JOB, "it has not concluded")
    ),
    Command(
        "prefetch",
        "Populates images now, without waiting for a reader. It works on a mount with "
        "--no-populate, too.",
        (
            _PATHS,
            Argument(
                "format",
                "str",
                "format of the file, whose name changes with it; only if nothing of the image is "
                "cached",
                optional=True,
                values=("raw", "qcow2"),
            ),
        ),
        returns=(
            _COUNT,
            Field(
                "paths",
                "list",
                "paths of the images, relative to the mountpoint; new ones if the format changed",
            ),
        ),
        errors=(
            _NO_IMAGE,
            "the repository does not answer",
            "an image has failed",
            "another format is asked for, and something is cached",
        ),
    ),
    Command(
        "set-rate",
        "Limits the population of each image, in addition to the mount's own limit. If `path` is "
        "empty, it sets the mount's limit, which is for all images together.",
        (_PATHS, Argument("rate", "int", "bytes per second; 0 removes the limit")),
        returns=(_COUNT,),
        errors=(_NO_IMAGE,),
    ),
    Command(
        "evict",
        "Drops what is cached of images. Processes that have an image open keep reading it; the "
        "next open begins anew. In a folder, images that must not be evicted are left out.",
        (
            _PATHS,
            Argument("dry-run", "bool", "only say what would be evicted", optional=True),
        ),
        returns=(
            _COUNT,
            Field("bytes", "int", "what they have taken of the disk"),
            Field(
                "open_bytes",
                "int",
                "how much of that becomes free only when those who have the images open close them",
            ),
            Field("left", "int", "images in the folder that have something cached and stay"),
        ),
        errors=(
            _NO_IMAGE,
            "the image is pinned, or is the backing file of an overlay",
            "the image is gone from the repository: `forget` drops such an image",
        ),
    ),
    Command(
        "pin",
        "Protects images from eviction, by hand or for space.",
        (_PATHS,),
        returns=(_COUNT,),
        errors=(_NO_IMAGE,),
    ),
    Command("unpin", "Undoes `pin`.", (_PATHS,), returns=(_COUNT,), errors=(_NO_IMAGE,)),
    Command(
        "forget",
        "Drops images that are gone from the repository, with what is cached of them. Other "
        "images in a folder stay.",
        (_PATHS,),
        returns=(_COUNT,),
        errors=(_NO_IMAGE, "an image is in the repository, is pinned, or is open"),
    ),
    Command(
        "query-map",
        "Returns which ranges of an image are cached, in the form of `qemu-img map`.",
        (_PATH,),
        returns=(
            Field("start", "int", "offset in the export, in bytes"),
            Field("length", "int", "number of bytes"),
            Field("present", "bool", "true if it is in the cache, or is known to be zeroes"),
            Field("zero", "bool", "true if it is known to read as zeroes"),
            Field("data", "bool", "true if the cache file has data there"),
        ),
        returns_list=True,
        errors=(_NO_IMAGE, "the size of the image is not known"),
    ),
    Command(
        "verify",
        "Reads back what is cached of an image, as a job. Without a digest and "
        "`against-repository`, only what the disk cannot read is found. A damaged image is "
        "dropped, and fetched again when needed. One that differs from the repository is kept, "
        "unless `drop` is true.",
        (
            _PATH,
            Argument(
                "digest",
                "str",
                "digest of the whole export, such as sha256:9f86...; it is kept if it is right. "
                "If the image is not whole, it is kept, too, and compared before the hand-off",
                optional=True,
            ),
            Argument(
                "against-repository", "bool", "compare with the repository as well", optional=True
            ),
            Argument(
                "drop",
                "bool",
                "drop what differs from the repository, unless it is pinned, open or the backing "
                "file of an overlay",
                optional=True,
            ),
        ),
        returns=(
            Field(
                "id",
                "str",
                "id of the job, which has an error if the cache is damaged; left out if a digest "
                "was only kept",
                optional=True,
            ),
        ),
        errors=(
            _NO_IMAGE,
            "`digest` is not a digest",
            "the image is being verified already",
        ),
    ),
    Command(
        "detach",
        "Unmounts although files are open. New opens get the plain files; open files are served "
        "until they are closed.",
        (Argument("force", "bool", "detach even if an open image is not whole", optional=True),),
        returns=(Field("open_count", "int", "number of files that stay open"),),
        errors=(
            "an open image is not whole, and `force` is not true",
            "the mount is detached already",
        ),
    ),
    Command(
        "upgrade",
        "Ends the daemon, and starts one of another installed version. Open files stay open. If it "
        "does not answer in 10 s, the version before it starts again.",
        (Argument("python", "str", "absolute path of the interpreter that has the other version"),),
        errors=("the mount is detached", "there is no such interpreter"),
    ),
)

EVENTS = (
    Event(
        "JOB_STATUS_CHANGE",
        "A job has begun, has another status, or is gone, as in QEMU's event of that name.",
        (
            Field("id", "str", "id of the job"),
            Field("status", "str", 'as in `query-jobs`; "null" if it is gone'),
        ),
    ),
    Event(
        "IMAGE_STATE_CHANGE",
        "An image has another state.",
        (
            Field("path", "str", "path of the image, relative to the mountpoint"),
            Field("state", "str", "as in `query-images`"),
            Field("error", "str", "as in `query-images`"),
        ),
    ),
)

EVENT_NAMES = frozenset(event.name for event in EVENTS)


def check_arguments(command: Command, arguments: Mapping[str, Any]) -> None:
    """Compare what a client has sent with the schema.

    Raises:
        CommandError: names the argument, in the words that QEMU uses.
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
    # In Python a bool is an int, but not in JSON. An integer has 64 bits in QEMU, and any number of
    # bits in Python.
    fits = isinstance(value, _TYPES[argument.type])
    if argument.type == "int":
        fits = fits and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if not fits:
        raise CommandError(
            f"Invalid parameter type for '{argument.name}', expected: {_EXPECTED[argument.type]}"
        )
    if argument.values and value not in argument.values:
        raise CommandError(f"Parameter '{argument.name}' does not accept value '{value}'")


# -- what clients are told about the schema


def introspection() -> list[dict[str, Any]]:
    """Return what `query-qmp-schema` returns (QEMU, qapi/introspect.json)."""
    found: list[dict[str, Any]] = [
        {"name": name, "meta-type": "builtin", "json-type": json_type}
        for name, json_type in {
            "str": "string", "int": "int", "bool": "boolean", "number": "number",
            "null": "null", "any": "value",
        }.items()
    ]  # fmt: skip
    found.append({"name": "list", "meta-type": "array", "element-type": "any"})
    found.append({"name": "object", "meta-type": "object", "members": []})
    found.append(
        {
            "name": "int or null",
            "meta-type": "alternate",
            "members": [{"type": "int"}, {"type": "null"}],
        }
    )
    for command in COMMANDS:
        argument_type, return_type = f"{command.name}-arg", f"{command.name}-ret"
        found.append(
            {
                "name": command.name, "meta-type": "command", "allow-oob": False,
                "arg-type": argument_type,
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
            found.append(
                {"name": f"[{return_type}]", "meta-type": "array", "element-type": return_type}
            )
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
        parts.append(f"### {event.name}\n\n{_wrapped(event)}\n\n{_table('data', event.data)}")
    return "\n".join(parts)


_INTRODUCTION = """# The control socket

<!-- Made from lazyfs/core/control_schema.py by tools/make-docs. -->

Each daemon listens on a UNIX socket with mode 0600:
`/run/lazyfs/<mountpoint, escaped as systemd-escape --path>.sock`. For users other than root it is
in `$XDG_RUNTIME_DIR/lazyfs/`. [FORMATS.md](FORMATS.md#control-sockets) has the rest about its name.

It speaks QMP as QEMU does, so `qmp-shell` and the `qemu.qmp` library can be clients. Every command
of `lazyfs` that asks a daemon uses it, too. `lazyfs status --json` prints `{"mounts": [...]}`: for
each mount what `query-mount` returns, with `images` and `jobs` added.

- A message is at most 64 KiB long, and there are at most 64 clients.
- Failures are of class `GenericError`. If an argument is wrong, the message names it.
- An unknown command, or a command before `qmp_capabilities`, fails with `CommandNotFound`.

Example:

    qmp-shell /run/lazyfs/var-lib-imagecache.sock
    (QEMU) query-images path=debian-12
"""

WIDTH = 100
"""Columns of the document, except for tables."""


def _describe(command: Command) -> str:
    parts = [f"### {command.name}\n\n{_wrapped(command)}\n"]
    if command.arguments:
        parts.append(_table("argument", command.arguments))
    if command.returns:
        parts.append(
            _table("returns a list of" if command.returns_list else "returns", command.returns)
        )
    if len(command.errors) == 1:
        parts.append(f"It fails if {command.errors[0]}.\n")
    elif command.errors:
        parts.append("It fails if:\n\n" + "".join(f"- {error}\n" for error in command.errors))
    return "\n".join(parts)


def _wrapped(named: Command | Event) -> str:
    return textwrap.fill(f"{named.meaning} Since {named.since}.", WIDTH, break_on_hyphens=False)


def _table(title: str, members: tuple[Argument, ...] | tuple[Field, ...]) -> str:
    rows = [f"| {title} | type | |", "|---|---|---|"]
    for member in members:
        values = getattr(member, "values", ())
        kind = " or ".join(f'"{value}"' for value in values) if values else member.type
        rows.append(
            f"| `{member.name}`{' (optional)' if member.optional else ''} | {kind} | "
            f"{member.meaning} |"
        )
    return "\n".join(rows) + "\n"
