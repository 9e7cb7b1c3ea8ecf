"""Bad inputs, end to end: a tiny sound checkpoint with one change each, and what the command line makes of it.

Every case is held to the same promises: the exit code, one line that names file and field, less than 5 seconds, less
than 64 MiB above a sound run, and nothing on disk changed or left behind.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import mutations_config, mutations_text, mutations_weights
from tests.forkserver import server
from tests.mutations import CONFIG, MIB, SHOW, Case, nothing, play, sound, written

TABLES = {module.__name__: module.CASES for module in (mutations_config, mutations_text, mutations_weights)}
ROWS = [pytest.param(case, table, id=case.id) for table, cases in TABLES.items() for case in cases]


@pytest.fixture(scope="module", autouse=True)
def started() -> Iterator[None]:
    """The slow one first: it imports torch while the other one is at work already. Both end with this file: a child
    that lives counts against every budget.
    """
    servers = [server("warm"), server("cold")]
    yield
    for one in servers:
        one.close()
    server.cache_clear()


@pytest.mark.parametrize(("case", "table"), ROWS)
def test_a_bad_input_ends_as_one_line(case: Case, table: str, tmp_path: Path) -> None:
    play(case, table, tmp_path)


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.id for cases in TABLES.values() for case in cases]
    assert len(set(names)) == len(names)


def test_what_all_cases_start_from_is_small() -> None:
    for base in ("gemma3n", "llama"):
        assert sum(path.stat().st_size for path in sound(base).iterdir()) < 200_000


# The promises are kept only if breaking them is noticed.


def hoard() -> None:
    """100 MiB, touched."""
    globals()["hoarded"] = bytearray(b"x") * (100 * MIB)


def leave() -> None:
    """A file in the cache."""
    Path("cache", "leftover").touch()


def spoil() -> None:
    """One more byte in the checkpoint."""
    path = Path("model", CONFIG)
    path.write_text(path.read_text() + " ")


CASES = [
    Case("hoards", nothing, 0, (), (SHOW,), inside=hoard),
    Case("leaves", nothing, 0, (), (SHOW,), inside=leave),
    Case("spoils", nothing, 0, (), (SHOW,), inside=spoil),
    Case("talks", nothing, 0, (), (SHOW,), inside=lambda: os.write(2, b"a second line\n")),
    Case("talks-too-much", written(CONFIG, "{"), 65, (CONFIG,), inside=lambda: os.write(2, b"edge: error: first\n")),
    Case("prints", written(CONFIG, "{"), 65, (CONFIG,), inside=lambda: os.write(1, b"something\n")),
    Case("dies", nothing, 0, (), (SHOW,), inside=os.abort),
    Case("opens", nothing, 0, (), (SHOW,), closed=(f"model/{CONFIG}",)),
    Case("other-code", written(CONFIG, "{"), 66, (CONFIG,)),
    Case("other-words", written(CONFIG, "{"), 65, ("line 7",)),
    Case("sleeps", nothing, 0, (), (SHOW,), inside=lambda: time.sleep(60)),
]
NOTICED = {
    "hoards": "above the floor",
    "leaves": "left behind",
    "spoils": "a file was changed",
    "talks": "a second line",
    "talks-too-much": "edge: error: first",
    "prints": "something",
    "dies": "exit code -6",
    "opens": "in spite of everything",
    "other-code": "exit code 65",
    "other-words": "without .'line 7'",
}


@pytest.mark.parametrize("case", CASES[:-1], ids=[case.id for case in CASES[:-1]])
def test_a_broken_promise_is_noticed(case: Case, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=NOTICED[case.id]):
        play(case, __name__, tmp_path)


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    report = server("cold").run([], tmp_path, {}, f"{__name__}:sleeps", limit=0.2)
    assert report.code is None
    assert report.wall < 2
