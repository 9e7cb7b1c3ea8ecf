"""Reading JSON that nobody vouches for, and a typed reader that refuses what it does not understand."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, Final, TypeAlias, TypeVar

from loaders.errors import BadCheckpoint, MissingFile, NotPermitted, ReadFailed, Unsupported

MIB = 1 << 20
# Config has methods called int, float, bool and str: inside the class those names are no longer types.
Int: TypeAlias = int
Float: TypeAlias = float
Bool: TypeAlias = bool
Str: TypeAlias = str
Path: TypeAlias = str | os.PathLike[str]
T = TypeVar("T")
V = TypeVar("V")


class Required(Enum):
    """The type of ``REQUIRED``: no default, the key has to be there."""

    REQUIRED = "required"


REQUIRED: Final = Required.REQUIRED


def show(value: object) -> str:
    """A JSON value in at most about 90 characters, for messages."""
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list | tuple):
        if len(value) > 8 or any(isinstance(v, list | tuple | dict) for v in value):
            return f"a list of {len(value)}"
        return "[" + ", ".join(show(v) for v in value) + "]"
    if isinstance(value, str):
        return f'"{short(value)}"'
    return short(json.dumps(value, default=repr))


def short(text: str) -> str:
    """The first 80 characters: a name from a file may be megabytes long."""
    return text if len(text) <= 80 else text[:79] + "…"


def known_other(head: bytes) -> str | None:
    """What the first bytes of a file say it is, when that is one of the usual wrong downloads."""
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, not the file itself (run `git lfs pull`)"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page, not the file itself (a failed download)"
    if head.startswith(b"\x1f\x8b"):
        return "gzip-compressed, which is not unpacked here"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "a zip archive or a pickle"
    return "a GGUF file" if head.startswith(b"GGUF") else None


def open_regular(path: Path) -> int:
    """Opens a regular file (symlinks followed) read-only and returns the descriptor; never blocks on a FIFO.

    Raises MissingFile (absent, or not a regular file), NotPermitted, ReadFailed (any other refusal, e.g. EMFILE).
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags)
    except ValueError:  # a NUL byte, or characters the file system cannot encode
        raise MissingFile("not a possible file name", file=path) from None
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EPERM):
            raise NotPermitted(e.strerror, file=path) from None
        if e.errno in (errno.EMFILE, errno.ENFILE):
            raise ReadFailed(e.strerror, file=path, hint="raise the limit with `ulimit -n`") from None
        if e.errno in (errno.EIO, errno.ENOMEM, errno.ESTALE):
            raise ReadFailed(f"cannot be opened: {e.strerror}", file=path) from None
        raise MissingFile(e.strerror, file=path) from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"))
        kind = next((name for test, name in kinds if test(mode)), "a device or socket")
        raise MissingFile(kind, file=path, expected="a regular file")
    return fd


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole file, its size checked against ``limit`` bytes before anything is read or allocated.

    Raises BadCheckpoint (larger than the limit), ReadFailed (I/O error, or shorter than fstat said), and what
    ``open_regular`` raises.
    """
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            bound = f"{limit // MIB} MiB" if limit % MIB == 0 else f"{limit} byte"
            raise BadCheckpoint(f"{size} bytes, larger than {bound} limit", file=path)
        parts: list[bytes] = []
        got = 0
        while got < size:
            try:
                part = os.pread(fd, size - got, got)
            except OSError as e:
                raise ReadFailed(f"read at offset {got}: {e.strerror}", file=path) from None
            if not part:
                raise ReadFailed(f"{got} bytes read, {size} wanted", file=path)
            parts.append(part)
            got += len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def parse_json(data: bytes | bytearray, file: str) -> dict[str, Any]:
    """One JSON object from UTF-8 (a BOM is accepted). Duplicate keys and numbers that are not finite are refused.

    Raises BadCheckpoint, with line and column where the parser knows them.
    """

    def bad(found: str, expected: str | None = None) -> BadCheckpoint:
        return BadCheckpoint(found, file=file, expected=expected)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) != len(items):
            twice = next(k for k, n in Counter(k for k, _ in items).items() if n > 1)
            raise BadCheckpoint("duplicate key", file=file, field=short(twice))
        return table

    def constant(text: str) -> float:
        raise bad(f"number {text}", "finite numbers only")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else constant(short(text))

    if not data or data.isspace():
        raise bad("empty file" if not data else "nothing but white space", "a JSON object")
    if other := known_other(bytes(data[:256])):
        raise bad(other, "JSON")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line, column = data.count(b"\n", 0, e.start) + 1, e.start - data.rfind(b"\n", 0, e.start)
        raise bad(f"not UTF-8 at line {line} column {column}") from None
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
    except json.JSONDecodeError as e:
        raise bad(f"not JSON: {e.msg} at line {e.lineno} column {e.colno}") from None
    except RecursionError:
        raise bad("JSON nested too deeply") from None
    except ValueError:  # the interpreter's limit on digits
        raise bad("an integer of thousands of digits") from None
    if not isinstance(value, dict):
        raise bad(show(value), "a JSON object at the top level")
    return value


def read_json(path: Path, limit: int = 8 * MIB) -> dict[str, Any]:
    """``parse_json`` of a file of at most ``limit`` bytes. Raises what ``read_bytes`` and ``parse_json`` raise."""
    return parse_json(read_bytes(path, limit), os.fspath(path))


def _same(a: object, b: object) -> bool:
    """Equality in which true is not 1; 1 and 1.0 are the same number."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return isinstance(a, bool) == isinstance(b, bool) and a == b


class Config:
    """A JSON object read key by key; ``finish`` refuses every key that nobody read.

    null counts as absent. Where several keys are given they are spellings of one thing: all count as read, the first
    present one wins, and two that disagree are an error. Every reader raises BadCheckpoint for a missing key without
    default, a wrong type or a value out of range; a sound value that is not implemented raises Unsupported.
    """

    def __init__(self, data: dict[Str, Any], file: Str, at: Str = "") -> None:
        self.data, self.file, self.at = data, file, at
        self._read: set[Str] = set()
        self._ignored: set[Str] = set()
        self._subs: dict[Str, Config] = {}

    def field(self, key: Str) -> Str:
        """The key's full dotted name, as messages spell it."""
        return f"{self.at}.{short(key)}" if self.at else short(key)

    def _bad(self, key: Str, found: object, expected: Str | None = None) -> BadCheckpoint:
        return BadCheckpoint(found, file=self.file, field=self.field(key), expected=expected)

    def _pick(self, keys: tuple[Str, ...], check: Callable[[Str, Any], V], default: T | Required) -> V | T:
        self._read.update(keys)
        found = [(key, check(key, self.data[key])) for key in keys if self.has(key)]
        if not found:
            if isinstance(default, Required):
                raise self._bad(" or ".join(keys), "missing")
            return default
        first, value = found[0]
        for key, other in found[1:]:
            if not _same(other, value):
                raise self._bad(key, f"{show(other)} disagrees with {self.field(first)} = {show(value)}")
        return value

    def _list(self, key: Str, value: Any, length: Int | None, check: Callable[[Str, Any], V]) -> tuple[V, ...]:
        if not isinstance(value, list) or (length is not None and len(value) != length):
            found = f"a list of {len(value)}" if isinstance(value, list) else show(value)
            raise self._bad(key, found, "a list" if length is None else f"a list of {length}")
        return tuple(check(f"{key}[{i}]", v) for i, v in enumerate(value))

    def _int(self, low: Int, high: Int) -> Callable[[Str, Any], Int]:
        def check(key: Str, value: Any) -> Int:
            if type(value) is not int or not low <= value <= high:  # bool is a subclass of int
                raise self._bad(key, show(value), f"an integer from {low} to {high}")
            return value

        return check

    def _float(self, low: Float | None, high: Float | None) -> Callable[[Str, Any], Float]:
        bounds = [f"> {low:g}"] if low is not None else []
        bounds += [f"<= {high:g}"] if high is not None else []
        expected = " and ".join(["a finite number", *bounds])

        def check(key: Str, value: Any) -> Float:
            try:
                number = float(value) if type(value) in (int, float) else math.nan
            except OverflowError:
                number = math.inf
            if not math.isfinite(number) or (low is not None and number <= low) or (high is not None and number > high):
                raise self._bad(key, show(value), expected)
            return number

        return check

    def _str(self, choices: tuple[Str, ...] | None) -> Callable[[Str, Any], Str]:
        def check(key: Str, value: Any) -> Str:
            if not isinstance(value, str):
                raise self._bad(key, show(value), "a string")
            if choices is not None and value not in choices:
                wanted = " or ".join(choices)
                raise Unsupported(show(value), file=self.file, field=self.field(key), expected=wanted)
            return value

        return check

    def int(self, *keys: Str, default: T | Required = REQUIRED, low: Int = 1, high: Int = 2**31 - 1) -> Int | T:
        """An integer in [low, high]; 24.0, "24" and true are refused."""
        return self._pick(keys, self._int(low, high), default)

    def float(
        self, *keys: Str, default: T | Required = REQUIRED, low: Float | None = None, high: Float | None = None
    ) -> Float | T:
        """A finite number in (low, high]: ``low`` itself is refused. Integers are accepted, true is not."""
        return self._pick(keys, self._float(low, high), default)

    def bool(self, *keys: Str, default: T | Required = REQUIRED) -> Bool | T:
        """true or false; 0 and 1 are refused."""

        def check(key: Str, value: Any) -> Bool:
            if not isinstance(value, bool):
                raise self._bad(key, show(value), "true or false")
            return value

        return self._pick(keys, check, default)

    def str(self, *keys: Str, default: T | Required = REQUIRED, choices: tuple[Str, ...] | None = None) -> Str | T:
        """A string; one outside ``choices`` raises Unsupported."""
        return self._pick(keys, self._str(choices), default)

    def strings(
        self,
        key: Str,
        length: Int | None = None,
        default: T | Required = REQUIRED,
        choices: tuple[Str, ...] | None = None,
    ) -> tuple[Str, ...] | T:
        """A list of strings, of exactly ``length`` if given; one outside ``choices`` raises Unsupported."""
        return self._pick((key,), lambda k, v: self._list(k, v, length, self._str(choices)), default)

    def floats(
        self,
        key: Str,
        length: Int | None = None,
        default: T | Required = REQUIRED,
        low: Float | None = None,
        high: Float | None = None,
    ) -> tuple[Float, ...] | T:
        """A list of finite numbers in (low, high], of exactly ``length`` if given."""
        return self._pick((key,), lambda k, v: self._list(k, v, length, self._float(low, high)), default)

    def ints(
        self,
        key: Str,
        length: Int | None = None,
        default: T | Required = REQUIRED,
        low: Int = 1,
        high: Int = 2**31 - 1,
    ) -> tuple[Int, ...] | T:
        """A list of integers in [low, high], of exactly ``length`` if given."""
        return self._pick((key,), lambda k, v: self._list(k, v, length, self._int(low, high)), default)

    def sub(self, key: Str, default: T | Required = REQUIRED) -> Config | T:
        """The nested object as a Config (the same one each time); its unread keys are this one's too."""

        def check(key: Str, value: Any) -> Config:
            if not isinstance(value, dict):
                raise self._bad(key, show(value), "an object")
            return self._subs.setdefault(key, Config(value, self.file, self.field(key)))

        return self._pick((key,), check, default)

    def has(self, key: Str) -> Bool:
        """Present and not null. Does not count as reading."""
        return self.data.get(key) is not None

    def null(self, key: Str) -> Bool:
        """An explicit null, where a family takes it for something else than absence."""
        return key in self.data and self.data[key] is None

    def raw(self, key: Str) -> Any:
        """The value as parsed, or None; counts as read, with everything inside it."""
        self._read.add(key)
        return self.data.get(key)

    def expect(self, key: Str, *allowed: object) -> None:
        """Absent, null or one of ``allowed``; anything else raises Unsupported. true is not 1; 1 is 1.0."""
        self._read.add(key)
        value = self.data.get(key)
        if value is not None and not any(_same(value, a) for a in allowed):
            wanted = " or ".join(map(show, allowed)) or "absent"
            found = f"{show(value)} is not implemented"
            raise Unsupported(found, file=self.file, field=self.field(key), expected=wanted)

    def ignore(self, *keys: Str) -> None:
        """Keys known not to change the model's numbers; ``*`` matches anything."""
        self._ignored.update(keys)

    def _unread(self) -> Iterator[Str]:
        for key, value in self.data.items():
            if key in self._subs:
                yield from self._subs[key]._unread()
            elif value is not None and key not in self._read and not any(fnmatchcase(key, p) for p in self._ignored):
                yield self.field(key)

    def finish(self) -> None:
        """Raises Unsupported if any key, nested ones included, holds a value and was neither read nor ignored."""
        unread = list(self._unread())
        if unread:
            more = f" and {len(unread) - 10} more" if len(unread) > 10 else ""
            found = f"unknown {'keys' if len(unread) > 1 else 'key'} {', '.join(unread[:10])}{more}"
            raise Unsupported(found, file=self.file, hint="edge does not know what it would change")
