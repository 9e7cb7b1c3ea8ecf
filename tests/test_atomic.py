"""Folders that appear whole or not at all, and what killed processes leave of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loaders.errors import CannotCreate
from loaders.formats import atomic
from loaders.formats.atomic import fresh_folder
from tests.faulty import ROOT

KILLED = """
import os, signal, sys
from loaders.formats.atomic import fresh_folder
with fresh_folder(sys.argv[1]) as folder:
    (folder / "large").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def left(parent: Path) -> list[str]:
    """Names of temporary folders."""
    return sorted(name for name in os.listdir(parent) if name.endswith(".tmp"))


def killed(output: Path) -> None:
    """Leaves what a process leaves that is killed while it writes ``output``."""
    assert subprocess.run([sys.executable, "-c", KILLED, output], cwd=ROOT, check=False).returncode == -9


def test_what_a_killed_process_left_goes_when_the_same_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "SETTLED", -1.0)
    killed(tmp_path / "out")
    killed(tmp_path / "other")
    assert len(left(tmp_path)) == 2
    with fresh_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "out" / "file").read_text() == "whole"
    assert [name.startswith(".other.") for name in left(tmp_path)] == [True]


def test_what_another_process_is_writing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "SETTLED", -1.0)
    with fresh_folder(tmp_path / "out") as first:
        (first / "file").write_text("first")
        with pytest.raises(CannotCreate), fresh_folder(tmp_path / "out") as second:  # noqa: PT012
            assert first.exists()
            assert len(left(tmp_path)) == 2
            (second / "file").write_text("second")
            os.rename(first, tmp_path / "out")
        os.rename(tmp_path / "out", first)
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert left(tmp_path) == []


def test_a_folder_made_this_moment_stays(tmp_path: Path) -> None:
    """Between being made and being held."""
    killed(tmp_path / "out")
    with fresh_folder(tmp_path / "out"):
        assert len(left(tmp_path)) == 2


def test_links_that_look_like_it_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "SETTLED", -1.0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / ".out.link.tmp").symlink_to(tmp_path / "mine")
    (tmp_path / ".out.file.tmp").write_text("a file")
    with fresh_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "mine" / "file").read_text() == "mine"
    assert (tmp_path / ".out.file.tmp").exists()


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "SETTLED", -1.0)
    monkeypatch.setattr(atomic, "hold", lambda folder: None)
    killed(tmp_path / "out")
    with fresh_folder(tmp_path / "out"):
        pass
    assert len(left(tmp_path)) == 1


def test_a_name_that_no_file_system_takes_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(CannotCreate, match="shorter name"), fresh_folder(tmp_path / ("x" * 300)):
        raise AssertionError
