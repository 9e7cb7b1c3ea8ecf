"""Checkpoints that many tests read, each made once per session. Nobody may write into them."""

from __future__ import annotations

import os
import shutil
import tempfile

# Before transformers is imported: nothing in these tests may ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor may they find, or leave, anything in the user's cache.
os.environ["EDGE_CACHE"] = tempfile.mkdtemp(prefix="edge-tests-")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# These models are too small for a second thread: where other processes want the cores, waiting for it costs seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

import edge
from edge.profile import box as boxed
from edge.session import Session
from tests import makers
from tests.shrink import real, shrink

collect_ignore = ["test_boxed.py"] if boxed.why_not() else []


def pytest_report_header() -> list[str]:
    """Whether memory control groups take part."""
    reason = boxed.why_not()
    return [f"memory control groups: {f'{reason}, test_boxed.py not collected' if reason else 'can be made'}"]


def pytest_unconfigure() -> None:
    """The cache of this run goes with it."""
    shutil.rmtree(os.environ["EDGE_CACHE"], ignore_errors=True)


logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)

Folder = Callable[[str], Path]
Open = Callable[..., Session]


@pytest.fixture(scope="session", autouse=True)
def warm_once() -> Iterator[None]:
    """Kernels stay warm: one warm-up for the whole session instead of one for each load."""
    from edge.engine import native_start, torch_start

    with pytest.MonkeyPatch.context() as patch:
        for module in (native_start, torch_start):
            patch.setattr(module, "warm_up", cache(module.warm_up))
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """name -> the text-only checkpoint of a shrunk real config in float32, with that config's own spelling."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            raw = shrink(real(name))
            made[name] = makers.make(tmp_path_factory.mktemp(name), raw.get("text_config", raw))
        return made[name]

    return folder


@pytest.fixture
def opened() -> Iterator[Open]:
    """``edge.load`` in float32, closed at the end of the test."""
    sessions: list[Session] = []

    def load(folder: Path, **options: Any) -> Session:
        sessions.append(edge.load(folder, **{"precision": "float32", "slice": "full", **options}))
        return sessions[-1]

    yield load
    for session in sessions:
        session.close()
