"""llama.cpp beside edge: the file it is given, how it is found, run and understood, whatever it does instead.

A module and a program made here stand for the real ones; what is started, told and read is real.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge.profile import gguf, peer, peer_bench, peer_child
from edge.profile.results import check
from loaders.errors import ReadFailed, Unsupported
from loaders.formats.recipe import recipes, stored_as, stored_bytes
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, tensors
from loaders.published import names, published
from loaders.sketch import sketch

SCALARS = {gguf.UINT32: "<I", gguf.FLOAT32: "<f", gguf.BOOL: "<?"}
# Published models that are written for llama.cpp, with what it calls their architecture; it loads every one of them.
WRITTEN = {
    **dict.fromkeys(("llama-3.1-8B", "llama-3.2-1B", "llama-3.2-3B"), "llama"),
    **dict.fromkeys(("mistral-7B-v0.3", "mistral-small-3.1-24B"), "llama"),
    **dict.fromkeys(("qwen3-0.6B", "qwen3-8B", "qwen3-32B"), "qwen3"),
    **dict.fromkeys(("gemma-3-1B", "gemma-3-4B", "gemma-3-27B"), "gemma3"),
    **dict.fromkeys(("gemma-3n-E2B", "gemma-3n-E4B"), "gemma3n"),
    **dict.fromkeys(("olmo2-7B", "olmo2-32B"), "olmo2"),
    "smollm3-3B": "smollm3",
}
FACTS = {
    "model": {"name": "small", "fingerprint": "aa", "weights": "synthetic"},
    "machine": {},
    "versions": {"edge": "1"},
}


@cache
def model_of(name: str) -> Model:
    return sketch(published(name)).model


class Reader:
    """A file's header, read as the format's specification has it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        assert self.take("<4sI") == (b"GGUF", 3)
        tensors, keys = self.take("<QQ")
        self.keys = {self.text(): self.value(self.take("<I")[0]) for _ in range(keys)}
        self.tensors = {self.text(): self.tensor() for _ in range(tensors)}

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        size = self.take("<Q")[0]
        return str(self.take(f"<{size}s")[0].decode())

    def value(self, kind: int) -> Any:
        if kind == gguf.STRING:
            return self.text()
        if kind == gguf.ARRAY:
            inner, count = self.take("<IQ")
            return [self.value(inner) for _ in range(count)]
        return self.take(SCALARS[kind])[0]

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        dims = self.take(f"<{self.take('<I')[0]}Q")
        return dims, *self.take("<IQ")


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_for_llama_cpp_reads_as_many_bytes_a_token_as_a_pack(name: str) -> None:
    model, recipe = model_of(name), recipes("int4")[0]
    wanted = sum(
        stored_bytes(shape, stored_as(tensor, shape, recipe))
        for tensor, shape in tensors(model).items()
        if tensor != PLE_TABLE and (tensor != "embed" or model.tied)
    )
    extra = {entry.nbytes for name, entry in gguf.entries(model).items() if name == "rope_freqs"}
    assert gguf.bytes_per_token(model) == wanted + sum(extra)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_header_names_every_tensor_where_it_will_lie(name: str) -> None:
    model = model_of(name)
    table = gguf.entries(model)
    data = gguf.header(gguf.metadata(model), table)
    found, end = Reader(data), 0
    assert len(data) % gguf.ALIGNMENT == 0
    assert 0 <= len(data) - found.at < gguf.ALIGNMENT
    assert found.keys["general.architecture"] == WRITTEN[name]
    assert found.keys[f"{WRITTEN[name]}.block_count"] == len(model.layers)
    assert found.keys[f"{WRITTEN[name]}.attention.layer_norm_rms_epsilon"] == pytest.approx(model.eps)
    assert list(found.tensors) == [f"{name}.weight" for name in table]
    for (dims, kind, at), entry in zip(found.tensors.values(), table.values(), strict=True):
        assert dims == entry.shape[::-1]
        assert kind == gguf.FORMATS[entry.stored][0]
        assert at % gguf.ALIGNMENT == 0
        assert 0 <= at - end < gguf.ALIGNMENT
        end = at + entry.nbytes


def test_gemma_3n_has_what_its_architecture_asks_for() -> None:
    table, keys = gguf.entries(model_of("gemma-3n-E2B")), gguf.metadata(model_of("gemma-3n-E2B"))
    assert table["altup_proj"].shape == (3, 2048, 2048)
    assert table["per_layer_token_embd"].shape == (262400, 7680)
    assert not table["per_layer_token_embd"].read
    assert table["blk.29.attn_k"].shape == table["blk.0.attn_k"].shape
    assert not table["blk.29.attn_k"].read
    assert keys["gemma3n.attention.shared_kv_layers"] == 10
    assert keys["gemma3n.attention.sliding_window_pattern"].count(False) == 6


def test_a_written_file_is_as_long_as_its_header_says(tmp_path: Path) -> None:
    model = model_of("qwen3-0.6B")
    small = replace(model, layers=model.layers[:1], vocab=96)
    gguf.write(small, tmp_path / "small.gguf")
    data = (tmp_path / "small.gguf").read_bytes()
    found = Reader(data)
    begin = -(-found.at // gguf.ALIGNMENT) * gguf.ALIGNMENT
    ends = [at + math.prod(dims) // values * size for dims, kind, at in found.tensors.values()
            for number, values, size in gguf.FORMATS.values() if number == kind]  # fmt: skip
    assert 0 <= len(data) - begin - max(ends) < gguf.ALIGNMENT


@pytest.mark.parametrize("name", [name for name in names() if name not in WRITTEN])
def test_other_mechanisms_are_refused_in_a_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"^\S+ \S.*, which is not written for llama.cpp") as refused:
        gguf.write(model_of(name), tmp_path / "model.gguf")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_header_alone_is_as_long_and_takes_no_room(tmp_path: Path, small: Model) -> None:
    gguf.write_header(small, tmp_path / "header.gguf")
    gguf.write(small, tmp_path / "whole.gguf")
    found, whole = (tmp_path / "header.gguf").stat(), (tmp_path / "whole.gguf").stat()
    assert found.st_size == whole.st_size == gguf.nbytes(small)
    assert found.st_blocks * 512 < found.st_size / 10


def test_a_disk_that_is_full_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gemma-3n-E4B")
    full = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda _: full)
    with pytest.raises(ReadFailed, match="disk full"):
        gguf.write(model, tmp_path / "model.gguf")
    with pytest.raises(ReadFailed):
        gguf.write(model, tmp_path / "missing" / "model.gguf")
    assert not list(tmp_path.iterdir())


# A module as small as one can be that peer_child.py takes for llama_cpp: a file's first bytes are looked at, tokens are
# counted, FAKE says what goes wrong.
FAKE_MODULE = """
import ctypes, os, signal, sys, time
__version__ = "0.0.fake"
assert not any(os.path.exists(os.path.join(path, "peer_child.py")) for path in sys.path)
FAKE = os.environ.get("FAKE", "")
if FAKE == "broken":
    raise ImportError("libllama.so: cannot open shared object file")
llama_token = ctypes.c_int32
llama_log_callback = lambda function: function
say = print
def llama_log_set(function, data):
    global say
    say = lambda text: function(4, text.encode(), data)
def llama_backend_init(): print("llama.cpp says hello", '{"half": ')
class Settings: pass
llama_model_default_params = llama_context_default_params = Settings
def llama_model_load_from_file(path, settings):
    assert settings.n_gpu_layers == 0
    known = b"qwen3" in open(path, "rb").read(200) and FAKE != "unknown"
    say("gguf: reading\\n" if known else "error loading model: unknown model architecture: 'x'\\n")
    say("llama_model_load_from_file_impl: failed to load model\\n")
    return settings if known else None
def llama_model_get_vocab(model): return 96
def llama_vocab_n_tokens(vocab): return vocab
class Context:
    held, fed = 0, []
def llama_init_from_model(model, wanted):
    Context.room = wanted.n_ctx
    return Context if wanted.n_threads == wanted.n_threads_batch == 2 else None
def llama_batch_get_one(tokens, count): return list(tokens)
def llama_decode(context, ids):
    assert all(0 <= i < 96 for i in ids) and len(ids) <= 512
    context.held += len(ids)
    if FAKE == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if FAKE == "hang": time.sleep(60)
    if FAKE == "exit": sys.stderr.write("ggml: assertion failed\\n"); os._exit(134)
    time.sleep(0.0005)
    return 1 if context.held > context.room or FAKE == "status" else 0
def llama_get_logits_ith(context, i): assert i == -1
def llama_get_memory(context): return context
def llama_memory_clear(context, data): context.held = 0
def llama_print_system_info(): return b"CPU : AVX2 = 1 | AVX512 = 0 | "
"""

# What stands for llama-bench: it writes down what it was asked, and answers that, or as FAKE says.
FAKE_BENCH = """
import json, os, signal, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(os.environ["ASKED"], "a") as file:
    file.write(json.dumps(given) + "\\n")
FAKE = os.environ.get("FAKE", "")
deep = "-d" in given
block = bytearray(b"x" * 30_000_000)
time.sleep(0.1)
if FAKE == "exit" and deep:
    sys.exit("error: invalid parameter for argument: -d")
if FAKE == "kill": os.kill(os.getpid(), signal.SIGKILL)
if FAKE == "hang": time.sleep(60)
if FAKE == "much":
    while True: print("x" * 10_000)
answers = []
def answer(p, n):
    values = [100.0 / (1 + deep)] * int(given["-r"])
    answers.append({"build_commit": "abc123", "build_number": 4567, "n_prompt": p, "n_gen": n,
                    "n_depth": int(given.get("-d", 0)), "avg_ts": values[0], "stddev_ts": 0.0, "samples_ts": values})
for p in map(int, given["-p"].split(",")):
    if p: answer(p, 0)
answer(0, int(given["-n"]))
print(os.environ.get("SAY") or json.dumps(answers))
"""


@pytest.fixture
def small() -> Model:
    model = model_of("qwen3-0.6B")
    return replace(model, layers=model.layers[:1], vocab=96)


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that has the module, named by the variable."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "llama_cpp.py").write_text(FAKE_MODULE)
    path = program(tmp_path / "python", f'PYTHONPATH={tmp_path}/modules exec {sys.executable} -S "$@"')
    monkeypatch.setenv(peer.VARIABLE, str(path))
    return path


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """llama-bench on a PATH where nothing else of the kind is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "bench.py").write_text(FAKE_BENCH)
    path = program(folder / "llama-bench", f'exec {sys.executable} -S {folder}/bench.py "$@"')
    monkeypatch.delenv(peer.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast memory reads is not what is tested."""
    monkeypatch.setattr(peer, "measured_bandwidth", lambda threads=None: 1e10)


def program(path: Path, line: str) -> Path:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def lines(model: Model, folder: Path, contexts: Sequence[int] = (8,), **settings: Any) -> list[dict[str, Any]]:
    """Of a whole run, checked as a file of results is."""
    found = peer.find()
    options = {"facts": FACTS, "threads": 2, "repeat": 2, "new": 4, **settings}
    with peer.weights(found, model, folder) as file:
        measured = list(peer.run(found, model, file, contexts, **options))
    assert not list(folder.glob("*.gguf"))
    for line in measured:
        check(json.loads(json.dumps(line, allow_nan=False)), "a line")
    return measured


def test_the_variable_comes_first_and_must_name_one(python: Path, bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(peer.VARIABLE, str(python))
    assert peer.find() == peer.Peer(str(python), "llama-cpp-python 0.0.fake")
    monkeypatch.setenv("FAKE", "broken")
    with pytest.raises(Unsupported, match=r"EDGE_PEERS_PYTHON: .*libllama.so: cannot open"):
        peer.find()
    for wrong, why in ((str(bench.parent / "none"), "does not start: No such file"), (str(bench.parent), "not start")):
        monkeypatch.setenv(peer.VARIABLE, wrong)
        with pytest.raises(Unsupported, match=why):
            peer.find()


def test_then_this_python_then_the_benchmark(
    python: Path, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr(peer.sys, "executable", str(python))
    assert peer.find().program == str(python)
    monkeypatch.setenv("FAKE", "broken")
    assert peer.find() == peer.Peer(str(bench), "llama-bench", bench=True)
    with pytest.raises(Unsupported, match=r"not installed: .*libllama.so.*pip install llama-cpp-python.*llama-bench"):
        peer.find({"PATH": str(tmp_path)})


def test_none_at_all_is_said_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "find_spec", lambda _: None)
    with pytest.raises(
        Unsupported, match=r"llama.cpp is not installed\. pip install llama-cpp-python, or put llama-bench"
    ):
        peer.find({"PATH": str(tmp_path)})


def test_a_python_with_it_is_measured_by_the_same_tests(python: Path, small: Model, tmp_path: Path) -> None:
    said: list[str] = []
    short, long = lines(small, tmp_path, (8, 600), say=said.append)
    assert [short["status"], long["status"]] == ["ok", "ok"]
    assert (short["case"], long["case"]) == ("llama.cpp, 8 tokens", "llama.cpp, 600 tokens")
    assert list(short["tests"]) == ["pp8", "tg4"]
    assert list(long["tests"]) == ["pp512", "pp600", "tg4", "tg4 @ d600"]
    assert list(long["latency_ms"]) == ["tg4", "tg4 @ d600"]
    for figure in (*long["tests"].values(), long["warm"]["load_s"], long["warm"]["ttft_s"]):
        assert len(figure["values"]) == 2
        assert min(figure["values"]) > 0
    assert [n for n, _ in long["first_token"]] == [512, 600]
    assert long["asked"] == {
        "budget": None, "budget_bytes": None, "context": 600, "device": "cpu", "engine": "llama.cpp", "threads": 2,
        "repeat": 2, "new": 4,
    }  # fmt: skip
    assert long["plan"] is None
    assert long["label"].endswith(
        "(llama-cpp-python 0.0.fake), Q4_0 with a Q8_0 head, random weights of the same shape"
    )
    assert long["versions"] == {"edge": "1", "llama.cpp": "llama-cpp-python 0.0.fake"}
    assert long["memory"]["peak_bytes"] >= long["memory"]["anonymous_bytes"] > 10**6
    assert long["bandwidth"]["bytes_per_token"] == gguf.bytes_per_token(small)
    assert long["timeline"]["marks"][-1][1] == "tg4 @ d600"
    assert long["model"] == {**FACTS["model"]}
    assert {"run 1 of 2: loaded", "run 2 of 2: tg4 @ d600"} <= {*said}
    if hasattr(os, "posix_fadvise"):
        assert long["cold"]["load_s"]["mean"] > 0
        assert "cold: tg4" in said
        assert "cold: pp512" not in said


def test_a_real_models_fingerprint_is_not_the_peers(python: Path, small: Model, tmp_path: Path) -> None:
    facts = {"model": {"name": "small", "fingerprint": "aa", "weights": "real"}, "machine": {}}
    (line,) = lines(small, tmp_path, facts=facts, repeat=1)
    assert line["model"] == {"name": "small", "fingerprint": None, "weights": "synthetic"}


@pytest.mark.parametrize(
    ("fake", "status", "why"),
    [
        ("kill", "killed", "killed by"),
        ("exit", "failed", "exit 134: ggml: assertion failed"),
        ("status", "failed", "llama_decode: 1"),
        ("hang", "failed", "not done after 1 seconds"),
    ],
)
def test_a_peer_that_does_not_get_there_is_a_line_that_says_so(
    python: Path, small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: str, status: str, why: str
) -> None:
    monkeypatch.setenv("FAKE", fake)
    (line,) = lines(small, tmp_path, timeout=0.6 if fake == "hang" else 30.0)
    assert (line["status"], line["why"][: len(why)]) == (status, why)
    assert line["label"]
    assert "tests" not in line


@pytest.mark.parametrize(
    "said", ["", "nonsense", "[" * 5000, '{"result": {}}', '{"result": {"load_s": "x", "first_s": []}}',
             '{"result": {"load_s": 1.0, "first_s": 1.0, "load_bytes": 1, "prompt_s": 1.0, "first_token": [], '
             '"decode": {"seconds": [0, 0, 0, 0]}, "memory": {"peak_bytes": 1}}}',
             '{"result": {"load_s": 1.0, "first_s": 1.0, "load_bytes": 1, "prompt_s": 1.0, "first_token": [], '
             '"decode": {"seconds": [1, 1, 1, 1]}, "memory": 7}}']
)  # fmt: skip
def test_a_python_that_says_something_else_has_failed(small: Model, tmp_path: Path, said: str) -> None:
    (tmp_path / "said").write_text(said)
    other = peer.Peer(str(program(tmp_path / "other", f"cat {tmp_path}/said")), "of no version")
    gguf.write_header(small, tmp_path / "model.gguf")
    (line,) = peer.run(other, small, tmp_path / "model.gguf", (8,), facts=FACTS, threads=2, repeat=2, new=4)
    assert line["status"] == "failed"
    assert line["why"] in ("ended without the figures that were asked for", "exit 0: no message")
    json.dumps(line, allow_nan=False)


def test_an_architecture_that_this_one_does_not_know_is_refused_before_it_is_written(
    python: Path, small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "unknown")
    monkeypatch.setattr(gguf, "write", lambda *_: pytest.fail("written"))
    with pytest.raises(Unsupported, match="unknown model architecture"):
        peer.check(peer.find(), small, tmp_path)
    with pytest.raises(Unsupported, match=r"does not load a qwen3 model: .*unknown model architecture: 'x'"):
        lines(small, tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


def test_the_benchmark_is_asked_for_the_same_tests(bench: Path, small: Model, tmp_path: Path) -> None:
    short, long = lines(small, tmp_path, (8, 600), repeat=3)
    asked = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    assert [(a["-p"], a["-n"], a.get("-d")) for a in asked] == [
        ("8", "4", None),
        ("512,600", "4", None),
        ("0", "4", "600"),
    ]
    assert {(a["-t"], a["-r"], a["-ngl"], a["-o"]) for a in asked} == {("2", "3", "0", "json")}
    assert {name: f["values"] for name, f in long["tests"].items()} == {
        "pp512": [100.0] * 3, "pp600": [100.0] * 3, "tg4": [100.0] * 3, "tg4 @ d600": [50.0] * 3,
    }  # fmt: skip
    assert list(short["tests"]) == ["pp8", "tg4"]
    assert long["label"].startswith("llama.cpp (llama-bench 4567 (abc123)), Q4_0")
    # Seen from outside.
    assert long["memory"]["anonymous_bytes"] > 30 * 10**6
    assert long["timeline"]["rss"]


@pytest.mark.parametrize(
    ("fake", "status", "why"),
    [
        ("exit", "failed", "exit 1: error: invalid parameter for argument: -d"),
        ("kill", "killed", "killed by"),
        ("hang", "failed", "not done after 1 seconds"),
        ("much", "failed", "said more than 4 MiB"),
    ],
)
def test_a_benchmark_that_does_not_get_there_is_a_line_that_says_so(
    bench: Path, small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: str, status: str, why: str
) -> None:
    monkeypatch.setenv("FAKE", fake)
    (line,) = lines(small, tmp_path, (600,), timeout=0.6 if fake == "hang" else 30.0)
    assert (line["status"], line["why"][: len(why)]) == (status, why)
    assert list(line.get("tests", {})) == (["pp512", "pp600", "tg4"] if fake == "exit" else [])


@pytest.mark.parametrize(
    "said",
    ["nonsense", "{}", "[]", "[1]", "[" * 5000, '[{"n_prompt": 8, "n_gen": 4, "samples_ts": [1.0]}]',
     '[{"n_prompt": "8", "samples_ts": [1.0]}]', '[{"n_prompt": 8, "samples_ts": []}]', '[{"n_prompt": 8}]',
     '[{"n_prompt": 8, "samples_ts": [NaN]}]', '[{"n_prompt": 8, "samples_ts": [0]}]',
     '[{"n_prompt": -8, "samples_ts": [1.0]}]', '[{"n_prompt": true, "samples_ts": [1.0]}]']
)  # fmt: skip
def test_answers_that_are_none_are_refused(said: str) -> None:
    with pytest.raises(ValueError, match=r"no JSON|no list|no test|samples_ts"):
        peer_bench.parsed(said)


def test_a_benchmark_that_answers_something_else_has_failed(
    bench: Path, small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAY", "ggml_cuda_init: found 0 devices")
    (line,) = lines(small, tmp_path)
    assert (line["status"], line["why"]) == ("failed", "llama-bench answered what cannot be read: no JSON")


def test_what_a_program_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    """It holds the pipe that is read to its end."""
    began = time.monotonic()
    path = program(tmp_path / "forks", f"sleep 60 & echo $! > {tmp_path}/pid; exit 3")
    ended, _ = peer.launch.run([str(path)], timeout=0.6)
    assert time.monotonic() - began < 10
    assert ended.status == "failed"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.02)
    pytest.fail("it still runs")


def test_an_interrupt_leaves_what_was_measured_and_goes_on(
    python: Path, small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, one = [], peer.launch.run

    def interrupted(*args: Any, **settings: Any) -> Any:
        turns.append(args)
        if len(turns) == (3 if hasattr(os, "posix_fadvise") else 2):
            raise KeyboardInterrupt
        return one(*args, **settings)

    gguf.write(small, tmp_path / "model.gguf")
    found = peer.find()
    monkeypatch.setattr(peer.launch, "run", interrupted)
    run = peer.run(found, small, tmp_path / "model.gguf", (8, 16), facts=FACTS, threads=2, repeat=5, new=4)
    line = next(run)
    assert (line["status"], line["why"]) == ("interrupted", "interrupted after 1 of 5 runs")
    assert list(line["tests"]) == ["pp8", "tg4"]
    with pytest.raises(KeyboardInterrupt):
        next(run)


def test_what_runs_in_the_peers_python_needs_nothing_of_ours() -> None:
    """It is started as a script where there is no edge."""
    text = Path(peer_child.__file__).read_text()
    found = [line.split()[1] for line in text.splitlines() if line.lstrip().startswith(("import ", "from "))]
    assert {name.partition(".")[0] for name in found} - {*sys.stdlib_module_names} == {"llama_cpp"}
