"""Configuration files: what is in them, and what is wrong with them."""

import argparse
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import errors
from lazyfs.cli import arguments, configuration, mount_options
from lazyfs.cli.verbs import VERBS
from lazyfs.core import config_file, config_key
from lazyfs.core.config_file import Origin

ROOT = Path(__file__).parents[2]
FILE = "/etc/lazyfs/main.toml"
KEYS = mount_options.mount_keys()
KEY = {key.name: key for key in KEYS}


def parse(text: str) -> dict[str, object]:
    return config_file.parse(text, KEYS, FILE)


def parsed(*words: str) -> argparse.Namespace:
    return arguments.parsers(VERBS).top.parse_args(words)


def test_values_are_those_of_the_options() -> None:
    text = """
        repository = "nbd://images.example.com"
        mountpoint = "/var/lib/imagecache"
        fill-rate = "50M"
        block-size = 131_072
        io-timeout = 0.5
        refresh = 7
        mode = "0440"
        uid = 107
        gid = "108"
        no-populate = true
        foreground = false
        on-change = "replace"
    """
    assert parse(text) == {
        "repository": "nbd://images.example.com", "mountpoint": "/var/lib/imagecache", "fill_rate": 50 << 20,
        "block_size": 128 << 10, "io_timeout": 0.5, "refresh": 7.0, "mode": 0o440, "uid": 107, "gid": 108,
        "no_populate": True, "foreground": False, "on_change": "replace",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fill-rate", "line 1: not TOML: Expected '=' after a key in a key/value pair"),
        ("refresh = 5\n\nuid = = 3", "line 3: not TOML: Invalid value (column 7)"),
        ("refresh = 5\nlog-file = [", "line 2: not TOML: Invalid value"),
        ("uid = 1\nuid = 2", "line 2: not TOML: Cannot overwrite a value"),
        ("a = " + "[" * 9999, "is nested too deeply"),
        ("uid = " + "9" * 5000, "line 1: not TOML: Exceeds the limit"),
        ("uid = 0x" + "f" * 5000, "uid: the number is too large"),
        ("fil-rate = 5", "fil-rate: there is no such key; did you mean fill-rate?"),
        ("fill_rate = 5", "fill_rate: there is no such key; did you mean fill-rate?"),
        ("xyzzy = 5", "xyzzy: there is no such key; there are repository, mountpoint, cache-dir,"),
        ('"a\\nb" = 5', '"a\\nb": there is no such key;'),
        ("[mount]\nuid = 5", "mount: there is no such key; did you mean mountpoint?"),
        ("config = 'other'", "config: there is no such key"),
        ("ready-fd = 3", "ready-fd: there is no such key"),
        ("help = true", "help: there is no such key"),
        ("populate = true", "populate: there is no such key; did you mean no-populate?"),
        ("fill-rate = 'fast'", "fill-rate: 'fast' is not a size; write bytes or a suffix"),
        ("fill-rate = 0", "fill-rate: a rate is at least 1 byte per second"),
        (
            "fill-rate = true",
            "fill-rate: true or false is given; allowed is BYTES/s, a number or a text in quotes",
        ),
        ("fill-rate = [1]", "fill-rate: a list is given; allowed is"),
        ("fill-rate.x = 1", "fill-rate: a table is given; allowed is"),
        ("fill-rate = 1979-05-27", "fill-rate: a date or time is given; allowed is"),
        ("refresh = nan", "refresh: 'nan' is not a number of seconds, at least 0.1"),
        ("no-populate = 1", "no-populate: a number is given; allowed is true or false"),
        ("no-populate = 'yes'", "no-populate: a text is given; allowed is true or false"),
        (
            "mode = 444",
            'mode: a number is given; allowed is an octal number in quotes, such as "0444"',
        ),
        ("mode = 0o444", "mode: a number is given; allowed is an octal number in quotes"),
        ("mode = '999'", "mode: '999' is not an octal file mode such as 0444"),
        ("format = 'vmdk'", 'format: \'vmdk\' is not "raw" or "qcow2"'),
        ("cache-dir = 'cache'", "cache-dir: 'cache' is not an absolute path"),
        ("mountpoint = ''", "mountpoint: '' is not an absolute path"),
        ("cache-dir = 5", "cache-dir: a number is given; allowed is an absolute path in quotes"),
        ('cache-dir = "/a\\u0000b"', "cache-dir: a NUL character is not allowed"),
        ("repository = 'http://host'", "repository: 'http://host' is not an NBD URI"),
        ("repository = 5", "repository: a number is given; allowed is a text in quotes"),
        ("uid = -1", "uid: '-1' is not a user or group number"),
    ],
)
def test_what_is_wrong_is_named(text: str, says: str) -> None:
    with pytest.raises(errors.WrongConfiguration) as caught:
        parse(text)
    assert str(caught.value).startswith(f"{FILE}: {says}")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


LITERALS = (
    "true", "false", "0", "1", "65536", "-1", "1.5", "inf", "1e30", '""', '"/"', '"raw"', '"64K"', '"0444"', '"nbd://h"',
    "[]", "[1]", '["/a"]', "{}", "{a = 1}", "1979-05-27", "07:32:00",
)  # fmt: skip


@pytest.mark.parametrize("name", KEY)
@pytest.mark.parametrize("literal", LITERALS)
def test_every_key_takes_a_value_or_says_what_it_takes(name: str, literal: str) -> None:
    try:
        assert parse(f"{name} = {literal}").keys() == {KEY[name].dest}
    except errors.WrongConfiguration as error:
        assert error.where == name and len(error.problem) > 10  # noqa: PT017, PT018  # either is right


@given(st.one_of(st.text(), st.builds("{} = {}".format, st.sampled_from(list(KEY)), st.text())))
def test_garbage_is_our_error_and_nothing_else(text: str) -> None:
    try:
        parse(text)
    except errors.WrongConfiguration as error:
        assert str(error).startswith(FILE)  # noqa: PT017


def values_of(key: config_key.Key) -> st.SearchStrategy[object]:
    """What the option can give, also on the command line, where any path can be given."""
    one: st.SearchStrategy[object]
    if key.is_flag:
        return st.booleans()
    if key.choices:
        one = st.sampled_from(key.choices)
    elif key.is_path:
        one = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).map(
            lambda text: f"/{text}"
        )
    elif key.metavar == config_key.OCTAL:
        one = st.integers(0, 0o777).map(lambda mode: mode & ~0o222)
    elif key.takes_numbers:
        one = st.sampled_from(
            [key.parse(text) for text in ("4096", "65536", "1048576", "9100") if takes(key, text)]
        )
    else:
        one = st.just("nbd+unix:///?socket=/run/nbd \"'\\é.sock")
    return st.lists(one, max_size=3) if key.is_list else one


def takes(key: config_key.Key, text: str) -> bool:
    try:
        key.parse(text)
    except ValueError:
        return False
    return True


@given(st.data())
def test_what_config_prints_is_a_configuration_of_the_same_values(data: st.DataObject) -> None:
    values: Mapping[str, object] = data.draw(
        st.fixed_dictionaries({}, optional={k.dest: values_of(k) for k in KEYS})
    )
    given_too: Mapping[str, object] = data.draw(
        st.fixed_dictionaries({}, optional={k.dest: values_of(k) for k in KEYS})
    )
    effective = config_file.settle(KEYS, values, given_too)
    text = config_file.render(effective, FILE)
    again = parse(text)
    assert {s.key.dest: again.get(s.key.dest) for s in effective} == {
        s.key.dest: s.value for s in effective
    }
    assert text.count("\n") == len(KEYS)
    for setting in effective:
        first = given_too if setting.key.dest in given_too else values
        assert setting.value == first.get(setting.key.dest, setting.key.default)


def test_each_value_says_where_it_came_from() -> None:
    settings = config_file.settle(KEYS, {"fill_rate": 5, "uid": 7}, {"uid": 8, "unknown": 1})
    origins = {setting.key.name: setting.origin for setting in settings}
    assert (origins["fill-rate"], origins["uid"], origins["gid"]) == (
        Origin.FILE,
        Origin.COMMAND_LINE,
        Origin.DEFAULT,
    )
    lines = [
        " ".join(line.split())
        for line in config_file.render(settings, "/etc/a\nb.toml").splitlines()
    ]
    assert "fill-rate = 5 # /etc/a\\nb.toml: fill-rate" in lines
    assert "uid = 8 # command line" in lines
    assert "# cache-dir is not set # default" in lines


def test_a_name_that_is_not_utf8_is_a_comment() -> None:
    text = config_file.render(config_file.settle(KEYS, {}, {"cache_dir": "/\udcff"}), None)
    assert "# cache-dir is not UTF-8" in text
    assert "cache-dir" not in tomllib.loads(text)


def test_every_option_of_mount_is_a_key() -> None:
    usage = arguments.parsers(VERBS).verbs["mount"].format_usage()
    options = {
        word.strip("[]").removeprefix("--") for word in usage.split() if word.startswith("[--")
    }
    assert options - {"config", "moved"} == KEY.keys() - {"repository", "mountpoint"}
    assert options & KEY.keys()


TEXTS = {
    "BYTES/s": "50M",
    "SIZE": "64K",
    "SECONDS": "12",
    "OCTAL": "0400",
    "N": "12",
    "MOUNTPOINT": "/mnt",
}


@pytest.mark.parametrize("name", [key.name for key in KEYS if not key.required])
def test_a_key_means_what_its_option_means(name: str) -> None:
    key = KEY[name]
    text = key.choices[-1] if key.choices else TEXTS.get(key.metavar, "/some/where")
    if not key.is_flag and not takes(key, text):
        text = next(other for other in ("1048576", "9100") if takes(key, other))
    words = [f"--{name}"] if key.is_flag else [f"--{name}", text]
    value: object = True if key.is_flag else [text] if key.is_list else text
    assert parse(f"{name} = {json.dumps(value)}") == {
        key.dest: getattr(parsed("mount", *words), key.dest)
    }


def test_only_what_is_given_is_in_the_namespace() -> None:
    assert vars(parsed("mount")).keys() & {key.dest for key in KEYS} == set()
    options = parsed("mount", "nbd://h", "--uid", "5", "/mnt", "--no-populate")
    assert (options.repository, options.mountpoint, options.uid, options.no_populate) == (
        "nbd://h",
        "/mnt",
        5,
        True,
    )


@pytest.mark.parametrize("verb", ["mount", "config"])
def test_flags_can_be_undone(verb: str) -> None:
    for key in KEYS:
        if key.is_flag:
            opposite = (
                f"--{key.name.removeprefix('no-')}"
                if key.name.startswith("no-")
                else f"--no-{key.name}"
            )
            assert getattr(parsed(verb, opposite), key.dest) is False
            assert getattr(parsed(verb, opposite, f"--{key.name}"), key.dest) is True


def scratch_keys() -> tuple[config_key.Key, ...]:
    parser = arguments.OneLineParser()
    parser.add_argument("--folder", metavar="DIR", action="append")
    parser.add_argument("--level", type=int, metavar="N", action="append", default=[1])
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    return config_key.keys_of(parser.arguments)


def test_an_option_that_repeats_is_a_list() -> None:
    keys = scratch_keys()
    assert [key.name for key in keys] == ["folder", "level"]
    assert config_file.parse('folder = ["/a", "/b"]\nlevel = [1, "2"]', keys, FILE) == {
        "folder": ["/a", "/b"], "level": [1, 2],
    }  # fmt: skip
    for text, says in (
        (
            'folder = "/a"',
            "folder: a text is given; allowed is a list, each item an absolute path in quotes",
        ),
        ('folder = ["/a", "b"]', "folder: 'b' is not an absolute path"),
        (
            "level = [[1]]",
            "level: a list is given; allowed is a list, each item N, a number or a text in quotes",
        ),
        ("level = ['x']", "level: invalid literal"),
    ):
        with pytest.raises(errors.WrongConfiguration) as caught:
            config_file.parse(text, keys, FILE)
        assert says in str(caught.value)
    effective = config_file.settle(keys, {"folder": ["/a"]}, {"folder": ["/b"]})
    assert effective[0].value == ["/b"]  # of the command line alone
    assert config_file.parse(config_file.render(effective, None), keys, FILE) == {
        "folder": ["/b"],
        "level": [1],
    }


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"config": None, "json": False, **given})


def test_a_name_is_looked_for_in_etc_and_a_path_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert configuration.path_of("main") == "/etc/lazyfs/main.toml"
    for path in ("main.toml", "./main", "/x/y", "a/b.toml"):
        assert configuration.path_of(path) == path
    with pytest.raises(errors.UsageError, match="empty name"):
        configuration.path_of("")
    monkeypatch.setattr(configuration, "FOLDER", str(tmp_path))
    with pytest.raises(errors.UserError, match="no configuration in"):
        configuration.load(configuration.path_of("main"), KEYS)
    (tmp_path / "ci.toml").write_text("")
    (tmp_path / "main.toml").write_text("uid = 5")
    assert configuration.load(configuration.path_of("main"), KEYS) == {"uid": 5}
    with pytest.raises(
        errors.UserError, match=r"No such file or directory \(there are: ci, main\)"
    ) as caught:
        configuration.load(configuration.path_of("nope"), KEYS)
    assert caught.value.exit_code == 1


def test_files_that_cannot_be_read_or_are_no_text(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"# x\nuid = 5 # \xff\n")
    with pytest.raises(
        errors.WrongConfiguration, match=r"binary.toml: line 2: not TOML: this is not UTF-8"
    ):
        configuration.load(str(binary), KEYS)
    with pytest.raises(errors.WrongConfiguration, match=r"/dev/zero: is larger than 1048576 bytes"):
        configuration.load("/dev/zero", KEYS)
    for path in (str(tmp_path), str(tmp_path / "none"), "nul\0.toml"):
        with pytest.raises(errors.UserError, match="cannot read the configuration") as caught:
            configuration.load(path, KEYS)
        assert caught.value.exit_code == 1


def test_options_get_every_key(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('repository = "nbd://h"\nfill-rate = "1M"\nno-populate = true')
    with pytest.raises(errors.UsageError, match="required: MOUNTPOINT"):
        configuration.apply(options(config=str(file)))
    with pytest.raises(errors.UsageError, match="required: REPOSITORY, MOUNTPOINT"):
        configuration.apply(options())
    given = options(config=str(file), mountpoint="rel", no_populate=False, refresh=5.0)
    configuration.apply(given)
    assert vars(given).keys() >= {key.dest for key in KEYS}
    assert (given.repository, given.mountpoint, given.fill_rate) == ("nbd://h", "rel", 1 << 20)
    assert (given.no_populate, given.refresh, given.io_timeout) == (False, 5.0, 120.0)
    shown = json.loads(configuration.show(options(config=str(file), json=True)))
    assert shown["file"] == str(file)
    assert shown["keys"]["fill-rate"] == {"value": 1 << 20, "origin": "file"}
    assert shown["keys"]["mode"] == {"value": "0444", "origin": "default"}


def test_the_document_is_up_to_date() -> None:
    document = (ROOT / "doc" / "CONFIGURATION.md").read_text()
    assert f"<!-- keys -->\n\n{config_file.table(KEYS)}\n<!-- end of keys -->" in document, (
        "run tools/make-docs"
    )


def test_a_bar_in_a_value_or_help_does_not_break_the_table() -> None:
    parser = arguments.OneLineParser()
    parser.add_argument("--some", metavar="A|B", type=int, help="this | that (default: x|y)")
    rows = config_file.table(config_key.keys_of(parser.arguments)).splitlines()
    assert rows[2] == "| `some` | A\\|B, a number or a text in quotes | x\\|y | this \\| that |"
    for row in [*rows, *config_file.table(KEYS).splitlines()]:
        assert len(re.findall(r"(?<!\\)\|", row)) == 5, row


def test_the_documents_example_is_right() -> None:
    document = (ROOT / "doc" / "CONFIGURATION.md").read_text()
    example = document.partition("```toml\n")[2].partition("```")[0]
    assert {"repository", "mountpoint", "fill_rate"} <= parse(example).keys()


def test_every_verb_has_help_with_an_example() -> None:
    found = arguments.parsers(VERBS).verbs
    assert list(found) == [verb.name for verb in VERBS]
    for name, parser in found.items():
        assert f"example: lazyfs {name} " in parser.format_help().replace("\n", " "), name


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_the_example_of_a_verb_is_right(verb: arguments.Verb) -> None:
    words = verb.example.replace("sha256:...", f"sha256:{'0' * 64}").split()
    assert parsed(verb.name, *words).run is verb.run
