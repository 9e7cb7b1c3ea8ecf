"""Hardened JSON (cases A1 to A9) and the config reader that refuses."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.errors import BadCheckpoint, EdgeError, MissingFile, NotPermitted, ReadFailed, Unsupported
from loaders.formats.config import MIB, Config, open_regular, parse_json, read_bytes, read_json, show

FILE = "config.json"


def config(**data: Any) -> Config:
    return Config(data, FILE)


@contextmanager
def refused(kind: type[EdgeError], *words: str) -> Iterator[None]:
    """The exact class, and a message of one line that holds every word."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


# files


def test_a1_missing(tmp_path: Path) -> None:
    with refused(MissingFile, "config.json", "No such file"):
        read_json(tmp_path / "config.json")


def test_a1_not_regular(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    os.symlink("loop", tmp_path / "loop")
    os.symlink(os.devnull, tmp_path / "device")
    for name, word in (("folder", "a folder"), ("fifo", "a FIFO"), ("loop", "links"), ("device", "a device")):
        with refused(MissingFile, name, word):
            read_json(tmp_path / name)
    for path in (tmp_path / "fifo" / "below", "nul\0", str(tmp_path / ("x" * 5000))):
        with refused(MissingFile):
            read_bytes(path, 10)


def test_names_are_escaped(tmp_path: Path) -> None:
    with refused(MissingFile, "a\\x1b[31m\\nb"):
        read_json(tmp_path / "a\x1b[31m\nb")


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EACCES, NotPermitted), (errno.EPERM, NotPermitted), (errno.EMFILE, ReadFailed), (errno.EIO, ReadFailed)],
)
def test_open_errors(number: int, kind: type[EdgeError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)  # a mode of 0000 does not stop root
    with refused(kind, "config.json", os.strerror(number)):
        open_regular(tmp_path / "config.json")


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b'{"a": 1}')
    os.symlink("blob", tmp_path / "config.json")
    assert read_json(tmp_path / "config.json") == {"a": 1}


def test_a4_limit_is_checked_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with open(path, "wb") as f:
        f.truncate(2 << 30)
    tracemalloc.start()
    with refused(BadCheckpoint, "config.json", "larger than 8 MiB limit"):
        read_json(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MIB
    path.write_bytes(b"x" * 11)
    with refused(BadCheckpoint, "11 bytes, larger than 10 byte limit"):
        read_bytes(path, 10)
    assert read_bytes(path, 11) == b"x" * 11


def test_short_and_partial_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "config.json", os.pread
    path.write_bytes(b'{"abc": 12345}')
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, min(n, 3), at))
    assert read_json(path) == {"abc": 12345}
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, min(n, 3), at) if at < 6 else b"")
    with refused(ReadFailed, "config.json", "6 bytes read, 14 wanted"):
        read_json(path)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with refused(ReadFailed, "config.json", "offset 0", "Input/output error"):
        read_json(path)


def test_descriptors_are_closed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    before = len(os.listdir("/dev/fd"))
    for path in (tmp_path / "config.json", tmp_path):
        for _ in range(5):
            try:
                read_json(path)
            except MissingFile:
                assert path == tmp_path
    assert len(os.listdir("/dev/fd")) == before


# JSON


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["empty file"]),
        (b" \n ", ["white space"]),
        (b"not json", ["not JSON", "line 1 column 1"]),
        (b'{"a": 1,\n "b": ', ["not JSON", "line 2 column 7"]),
        (b'{"a": 1}\n x', ["Extra data", "line 2 column 2"]),
        (b"{'a': 1}", ["line 1 column 2"]),
        ('{"a": 1}'.encode("utf-16"), ["not UTF-8", "line 1 column 1"]),
        (b'{\n"a": "\xff"}', ["not UTF-8", "line 2 column 7"]),
        (b"[1, 2]", ["[1, 2]", "a JSON object"]),
        (b'"text"', ['"text"', "a JSON object"]),
        (b"12", ["12", "a JSON object"]),
        (b"null", ["null", "a JSON object"]),
        (b'{"a":' * 100_000, ["nested too deeply"]),
        (b"[" * 100_000, ["nested too deeply"]),
        (b'{"a": ' + b"9" * 5000 + b"}", ["digits"]),
        (b'{"a": NaN}', ["NaN", "finite"]),
        (b'{"a": Infinity}', ["Infinity", "finite"]),
        (b'{"a": -Infinity}', ["-Infinity", "finite"]),
        (b'{"a": 1e999}', ["1e999", "finite"]),
        (b'{"a": -1e400}', ["-1e400", "finite"]),
        (b'{"x": {"hidden_size": 1, "b": 2, "hidden_size": 1}}', ["hidden_size", "duplicate key"]),
        (b'{"a": 1, "\\u0061": 2}', ["a: duplicate key"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ["git-LFS pointer"]),
        (b"\n<!DOCTYPE html><html></html>", ["HTML page"]),
        (b"\x1f\x8b\x08\x00", ["gzip"]),
    ],
)
def test_a2_to_a8_bad_json(data: bytes, words: list[str]) -> None:
    with refused(BadCheckpoint, "config.json: ", *words):
        parse_json(data, FILE)


def test_bom_is_accepted() -> None:
    assert parse_json(b"\xef\xbb\xbf{}", FILE) == {}


finite = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers() | finite | st.text(max_size=5)
values = scalars | st.lists(scalars, max_size=4) | st.dictionaries(st.text(max_size=5), scalars, max_size=3)
objects = st.dictionaries(st.text(max_size=5), values, max_size=5)


@settings(max_examples=60)
@given(objects)
def test_sound_json_is_what_json_says(data: dict[str, Any]) -> None:
    assert parse_json(json.dumps(data).encode(), FILE) == data
    assert all(len(show(v)) < 900 for v in data.values())


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_an_object_or_refused(data: bytes) -> None:
    try:
        got: object = parse_json(data, FILE)
    except BadCheckpoint as e:
        got = e
    assert isinstance(got, dict) or str(got).startswith(FILE)


# the typed reader


@pytest.mark.parametrize("value", [0, -1, 1.5, 24.0, "24", True, [], {}, 10**9, 2**63, 10**4000])
def test_a9_int(value: object) -> None:
    with refused(BadCheckpoint, "config.json: layers: ", show(value), "an integer from 1 to 1024"):
        config(layers=value).int("layers", high=1024)


def test_int_bounds() -> None:
    assert config(n=1).int("n") == 1
    assert config(n=2**31 - 1).int("n") == 2**31 - 1
    assert config(n=0).int("n", low=0) == 0
    with refused(BadCheckpoint, "2147483648"):
        config(n=2**31).int("n")


@pytest.mark.parametrize("data", [{}, {"n": None}])
def test_absent_or_null(data: dict[str, Any]) -> None:
    c = Config(data, FILE, "text")
    for read in (c.int, c.float, c.bool, c.str, c.strings, c.floats, c.ints, c.sub):
        with refused(BadCheckpoint, "config.json: text.n: missing"):
            read("n")
        assert read("n", default=None) is None
        assert read("n", default=7) == 7
    assert not c.has("n")
    assert c.raw("n") is None
    c.expect("n")
    c.finish()


def test_missing_names_every_spelling() -> None:
    with refused(BadCheckpoint, "heads or n_head: missing"):
        config().int("heads", "n_head")


@pytest.mark.parametrize("value", [0, -1.0, 0.0, True, "1", [1.0], 10**400])
def test_float_refuses(value: object) -> None:
    with refused(BadCheckpoint, "theta", show(value), "a finite number and > 0"):
        config(theta=value).float("theta", low=0)


def test_float_bounds() -> None:
    got = config(a=10000).float("a", low=0.0, high=10000.0)
    assert got == 10000.0
    assert type(got) is float
    with refused(BadCheckpoint, "<= 1"):
        config(a=1.5).float("a", high=1.0)
    with refused(BadCheckpoint):
        config(a=float("nan")).float("a")


def test_bool_and_str() -> None:
    assert config(a=True).bool("a") is True
    for value in (1, 0, "true"):
        with refused(BadCheckpoint, "a: ", "true or false"):
            config(a=value).bool("a")
    assert config(a="x").str("a", choices=("x", "y")) == "x"
    with refused(BadCheckpoint, "a: 1", "a string"):
        config(a=1).str("a", choices=("x",))
    with refused(Unsupported, 'config.json: a: "z"', "x or y"):
        config(a="z").str("a", choices=("x", "y"))


def test_lists() -> None:
    c = config(s=["a", "b"], f=[0, 0.5], i=[1, 2], e=[])
    assert c.strings("s", 2, choices=("a", "b")) == ("a", "b")
    assert c.floats("f", 2, high=1.0) == (0.0, 0.5)
    assert c.ints("i") == (1, 2)
    assert c.ints("e") == ()
    with refused(BadCheckpoint, "s: a list of 2", "a list of 3"):
        c.strings("s", 3)
    with refused(Unsupported, 's[1]: "b"', "(expected a)"):
        c.strings("s", choices=("a",))
    with refused(BadCheckpoint, "f[0]: 0", "> 0"):
        c.floats("f", low=0.0)
    with refused(BadCheckpoint, "i[0]: 1", "from 2"):
        c.ints("i", low=2)
    for name in ("strings", "floats", "ints"):
        with refused(BadCheckpoint, 'x: "ab"', "a list"):
            getattr(config(x="ab"), name)("x")
    with refused(BadCheckpoint, "x[1]: true"):
        config(x=[1, True]).ints("x")
    with refused(BadCheckpoint, "x[0]: 1", "a string"):
        config(x=[1]).strings("x")


def test_spellings() -> None:
    c = config(old=4, new=4, late=5)
    assert c.int("new", "old") == 4
    assert c.int("gone", "late") == 5
    with refused(BadCheckpoint, "late: 5 disagrees with old = 4"):
        c.int("old", "late")
    c.finish()
    assert config(a=10000, b=10000.0).float("a", "b") == 10000.0
    assert config(a=None, b=3).int("a", "b") == 3


def test_sub_is_one_reader_and_its_keys_count() -> None:
    c = config(text={"a": 1, "b": 2, "deep": {"x": 1, "y": None}})
    text = c.sub("text")
    assert c.sub("text") is text
    assert text.int("a") == 1
    with refused(BadCheckpoint, "config.json: text.b: 2", "a string"):
        text.str("b")
    assert text.sub("deep").at == "text.deep"
    with refused(Unsupported, "config.json: ", "unknown key text.deep.x. ", "edge does not know what it would change"):
        c.finish()
    text.sub("deep").int("x")
    c.finish()
    with refused(BadCheckpoint, "text: [1]", "an object"):
        config(text=[1]).sub("text")


def test_expect() -> None:
    c = config(a=1, t=True, s="yarn", n=[1, True], d={"k": 1})
    c.expect("a", 1.0)
    c.expect("n", [1, True])
    c.expect("d", {"k": 1})
    for key, allowed in (("a", True), ("t", 1), ("n", [1, 1]), ("n", [1]), ("d", {"k": True}), ("d", {})):
        with refused(Unsupported, f"config.json: {key}: ", "is not implemented"):
            c.expect(key, allowed)
    with refused(Unsupported, 's: "yarn" is not implemented', '"linear" or null'):
        c.expect("s", "linear", None)
    with refused(Unsupported, "s: ", "expected absent"):
        c.expect("s")
    c.finish()


def test_finish_lists_ten() -> None:
    with refused(Unsupported, "unknown keys k0, k1", "k9 and 5 more", "edge does not know what it would change"):
        config(**{f"k{i}": 0 for i in range(15)}).finish()
    with refused(Unsupported, "unknown key x" + "x" * 70, "…"):
        config(**{"x" * 10_000: 1}).finish()


def test_ignore_and_has() -> None:
    c = config(_name="x", vision_config={"a": 1}, image_token_id=5, kept=None, a=1)
    assert c.has("a")
    c.ignore("_*", "vision_config", "*_token_id")
    with refused(Unsupported, "unknown key a."):  # asking whether it is there is not reading it
        c.finish()
    assert c.raw("a") == 1
    c.finish()
    with refused(Unsupported, "unknown key Vision_config"):
        d = config(Vision_config=1)
        d.ignore("vision_*")
        d.finish()


@settings(max_examples=60)
@given(values, st.sampled_from(["int", "float", "bool", "str", "strings", "floats", "ints", "sub"]))
def test_every_reader_answers_or_refuses(value: object, name: str) -> None:
    try:
        got = getattr(config(key=value), name)("key")
    except BadCheckpoint as e:
        got = str(e)[: len(FILE)]
    kinds = {"int": int, "float": float, "bool": bool, "str": str, "sub": Config}
    assert got == FILE or type(got) is kinds.get(name, tuple)
