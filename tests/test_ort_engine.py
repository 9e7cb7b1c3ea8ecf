"""Exported packages through edge: plans, sessions, prices, what is remembered and what is baked.

That every family's package computes what its model does is for tests/test_export_families.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import edge
from edge import engine as engines
from edge.budget import price_ort
from edge.budget.memory import read_process
from edge.budget.plan import Floor, Request, enumerate_plans, pick
from edge.budget.price_ort import OrtPrices, Use
from edge.engine import ort_bake, ort_pages, ort_start
from edge.engine.ort_ple import open_rows
from edge.session import Session, open_source
from edge.store import packages
from loaders.errors import BadCheckpoint, OverBudget, Unsupported, Usage
from loaders.formats import package as formats
from loaders.formats.onnx_file import External
from loaders.formats.package import Package
from loaders.formats.synthetic import write_random
from tests import exported
from tests.command import Cli, cli_fixture, refused  # noqa: F401
from tests.exported import unasked_fixture  # noqa: F401
from tests.small import LLAMA, built, llama_fixture  # noqa: F401
from tests.test_claims import CONTEXT, PROMPT, assert_kept, environment, line, run

IDS = np.random.default_rng(0).integers(5, 300, 40)


@pytest.fixture(scope="module", name="made")
def made_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small packages; shared, so read-only."""
    home = tmp_path_factory.mktemp("packages")
    found = {}
    for name, model, keys in (
        ("plain", "llama", {}),
        ("gemma3n", "gemma3n", {}),
        ("gemma3n-int8", "gemma3n", {"precision": "int8"}),
        ("half", "llama", {"precision": "float16"}),
        ("genai", "llama", {"layout": "genai"}),
        ("web", "llama", {"layout": "web"}),
        ("standard", "gemma3n", {"profile": "standard"}),
    ):
        found[name] = home / name
        with closing(open_source(built(model))) as source:
            exported.export(source, found[name], **keys)
    return found


@pytest.fixture(name="copied")
def copied_fixture(made: dict[str, Path], tmp_path: Path) -> Path:
    """A package of per-layer embeddings to change."""
    folder = tmp_path / "package"
    shutil.copytree(made["gemma3n-int8"], folder)
    return folder


def quiet(what: str, done: int, total: int) -> None:
    """Nobody watches."""


def plans(folder: Path, **keys: Any) -> list[Any]:
    """Every plan of a package on a made-up floor."""
    with closing(Package.open(folder)) as package:
        return enumerate_plans(package, Request(engine="ort", **keys), Floor(50 << 20))


@pytest.mark.parametrize("name", ["plain", "gemma3n", "genai", "web", "standard"])
def test_a_session_over_a_package_answers_as_one_over_its_model(name: str, made: dict[str, Path]) -> None:
    model = built("gemma3n" if name in ("gemma3n", "standard") else "llama")
    with edge.load(model, precision="float32", slice="full", kv="float32", context=64) as session:
        wanted = session.logits(IDS)
    with edge.load(made[name]) as session:
        assert (session.engine.name, session.plan.engine, session.plan.context) == ("ort", "ort", exported.CONTEXT)
        found = [session.step(IDS[:13]), *(session.step([i]) for i in IDS[13:])]
        before = session.engine.position
        every = session.logits(IDS)
        assert session.engine.position == before
        session.reset()
        again = session.step(IDS)
    limit = 1e-4 * np.abs(wanted).max()
    assert np.abs(every - wanted).max() <= limit
    assert np.abs(np.stack(found) - wanted[12:]).max() <= limit
    assert np.abs(again - wanted[-1]).max() <= limit


def test_what_a_pass_leaves_half_done_is_forgotten(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with edge.load(made["gemma3n"]) as session:
        wanted = session.step(IDS)
        with monkeypatch.context() as patch:
            patch.setattr(session.engine.pages, "passed", lambda tokens: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                session.step([7, 8, 9])
        assert (session.engine.position, session.tokens) == (0, [])
        assert np.array_equal(session.step(IDS), wanted)


def test_nothing_wanted_is_nothing_given_and_more_than_the_context_is_refused(made: dict[str, Path]) -> None:
    with edge.load(made["plain"], context=16) as session:
        assert session.engine.forward(IDS[:3], "none").shape == (0, session.model.vocab)
        assert session.engine.position == 3
        session.reset()
        with pytest.raises(Usage, match="context"):
            session.step(IDS)
        assert len(session.logits(IDS[:16])) == 16


def test_logits_that_would_break_the_budget_are_refused(made: dict[str, Path]) -> None:
    with edge.load(made["plain"]) as session:
        need = price_ort.logits_bytes(session.checkpoint, 16, 16)
        assert need > 16 * session.model.vocab * 4
        session.request = replace(session.request, budget=read_process().rss + need // 2)
        with pytest.raises(OverBudget, match="logits"):
            session.logits(IDS[:16])


@pytest.mark.parametrize("tier", ["ram", "ssd"])
def test_rows_come_from_either_tier(tier: str, made: dict[str, Path]) -> None:
    with edge.load(made["gemma3n-int8"], ple=tier) as session:
        found = session.logits(IDS)
        assert session.ple is not None
        assert (session.ple.rows, session.ple.bytes_read > 0) == (len(IDS), tier == "ssd")
    with edge.load(made["gemma3n-int8"]) as session:
        assert np.array_equal(session.logits(IDS), found)


def test_a_table_of_another_width_is_refused(made: dict[str, Path]) -> None:
    with closing(Package.open(made["gemma3n-int8"])) as package:
        assert package.model.ple is not None
        package.model = replace(package.model, ple=replace(package.model.ple, dim=16))
        with pytest.raises(BadCheckpoint, match="shape"):
            open_rows(package, "ram", 0)


# Plans


def test_a_plan_is_the_package_and_leaves_open_what_a_run_decides(made: dict[str, Path]) -> None:
    found = plans(made["gemma3n-int8"])
    assert {(p.precision, p.slice, p.kv) for p in found} == {("int8", "full", "float32")}
    assert {p.ple for p in found} == {"ram", "ssd"}
    assert found[0].bytes.keys() == {"runtime", "tokenizer", "weights", "ple", "kv", "activations"}
    assert plans(made["half"])[0].kv == "float16"
    assert plans(made["plain"], context=100)[0].context == exported.CONTEXT
    long, short = (plans(made["plain"], context=n)[0].bytes["kv"] for n in (64, 16))
    assert long == 4 * short


def test_more_budget_is_never_a_worse_plan(made: dict[str, Path]) -> None:
    found = plans(made["gemma3n"])
    totals = sorted({plan.total_bytes for plan in found})
    ranks = [found.index(pick(found, Request(budget=total))) for total in totals]
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.parametrize(
    ("flag", "value", "held"),
    [("slice", "half", "full"), ("precision", "int4", "int8"), ("kv", "bf16", "float32")],
)
def test_flags_that_contradict_a_package_are_refused_by_name(
    flag: str, value: str, held: str, made: dict[str, Path]
) -> None:
    with pytest.raises(Unsupported, match=f"--{flag} {value}: this package holds {held}"):
        plans(made["gemma3n-int8"], **{flag: value})


def test_engines_run_what_they_can(made: dict[str, Path], llama: Path, cli: Cli) -> None:
    refused(cli("run", made["plain"], "x", "--engine", "torch"), 78, "--engine torch", "an exported package")
    refused(cli("run", llama, "x", "--engine", "ort"), 78, "--engine ort", "edge export MODEL -o DIR")
    refused(cli("plan", llama, "--engine", "ort"), 78, "--engine ort")
    refused(cli("run", made["plain"], "x", "--device", "cuda"), 78, "--device", "cuda")
    refused(cli("run", made["plain"], "x", "--device", "tpu"), 2, "--device", "tpu")
    refused(cli("slice", made["plain"], "--slice", "half", "-o", "never"), 2, "an exported package")
    refused(cli("pack", made["plain"]), 2, "an exported package")
    refused(cli("calibrate", made["plain"], "--text", __file__), 78, "an exported package")
    refused(cli("eval", made["plain"], "--text", __file__, "--save"), 78, "--save")


def test_an_older_library_than_a_package_needs_is_refused(made: dict[str, Path]) -> None:
    ort_start.require("1.2", made["plain"])
    with pytest.raises(Unsupported, match=r"min_ort.*expected 99\.1 or later"):
        ort_start.require("99.1", made["plain"])
    assert ort_start.numbers("1.9") < ort_start.numbers("1.10.1") < ort_start.numbers("1.11")


# Commands


def test_commands_take_a_package_as_a_model(made: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("once upon a time there was a small model")
    done = cli("run", made["gemma3n-int8"], "once upon", "-n", 4, "--temp", 0, "--json")
    assert (done.code, len(done.json["tokens"]), done.json["plan"]["engine"]) == (0, 4, "ort")
    planned = cli("plan", made["gemma3n-int8"], "--json").json
    assert (planned["weights"], planned["plan"]["precision"]) == (True, "int8")
    assert "int8" in cli("plan", made["gemma3n-int8"]).out
    scored = cli("eval", made["half"], "--text", text, "--json").json
    assert (scored["precision"], scored["kv"], scored["saved"]) == ("float16", "float16", None)
    seen = cli("inspect", made["gemma3n-int8"], "--json").json
    assert (seen["package"]["profile"], seen["package"]["precision"], seen["pack"]) == ("ort", "int8", None)
    assert all(row["bytes"] > 0 for row in seen["layers"])
    assert "profile ort, layout edge" in cli("inspect", made["gemma3n-int8"]).out


def test_neither_torch_nor_onnx_is_imported(made: dict[str, Path]) -> None:
    program = f"""
import sys, edge
with edge.load({str(made["gemma3n-int8"])!r}) as session:
    list(session.generate("once upon a time", max_tokens=2))
print([name for name in sys.modules if name.partition(".")[0] in ("torch", "onnx", "transformers")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# What is remembered


def test_sums_are_compared_once_and_again_when_a_file_was_touched(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening sums small files; here all are large, as weights are."""
    monkeypatch.setattr(formats, "SMALL", 0)
    counted: list[Path] = []
    whole = Package.verify
    monkeypatch.setattr(Package, "verify", lambda self, *a: (counted.append(self.folder), whole(self, *a))[1])

    def verified() -> int:
        with closing(Package.open(copied)) as opened:
            packages.verify(opened, quiet)
        return len(counted)

    assert [verified(), verified()] == [1, 1]
    data = copied / "model.onnx.data"
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    for _ in range(2):
        with pytest.raises(BadCheckpoint, match=r"model\.onnx\.data"):
            edge.load(copied)
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    assert [verified(), verified()] == [4, 4]


# Baked weights


@pytest.fixture(name="baking")
def baking_fixture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own, and packages of any size worth baking."""
    monkeypatch.setattr(ort_bake, "LEAST", 1)
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "baked"


def bake(package: Package, room: int | None = None, planned: int = 1 << 40) -> Path | None:
    """As loading does it."""
    return ort_bake.baked(package, OrtPrices(package), planned, room, quiet)


def test_packed_weights_are_baked_once_and_compute_the_same(made: dict[str, Path], baking: Path) -> None:
    with closing(Package.open(made["gemma3n-int8"])) as package:
        assert ort_bake.ready(package) is None
    answers, written = [], 0
    for _ in range(2):
        with edge.load(made["gemma3n-int8"]) as session:
            answers.append(session.logits(IDS))
            (folder,) = (f for f in baking.iterdir() if f.is_dir())
            assert ort_bake.ready(session.checkpoint) == folder / "model.onnx"
            places = ort_bake.places(folder / "model.onnx")
            tables = [weight.name for weight in OrtPrices(session.checkpoint).rows()]
            assert len(tables) == 1
            assert places[tables[0]][1] > 0
            written = written or (folder / "weights.bin").stat().st_mtime_ns
            maps = Path("/proc/self/maps").read_text()
            assert str(folder / "weights.bin") in maps
            assert str(made["gemma3n-int8"] / "model.onnx.data") not in maps
    assert (folder / "weights.bin").stat().st_mtime_ns == written
    assert np.array_equal(answers[0], answers[1])
    shutil.rmtree(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_bake, "LEAST", 1 << 60)
        with edge.load(made["gemma3n-int8"]) as session:
            assert np.array_equal(session.logits(IDS), answers[0])
    assert not folder.exists()


def test_what_was_baked_is_trusted_while_it_is_whole_and_of_this_library_and_cpu(
    made: dict[str, Path], copied: Path, baking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Package.open(copied)) as opened:
        gone = bake(opened)
        assert gone is not None
    shutil.rmtree(copied)
    with closing(Package.open(made["plain"])) as package:
        graph = bake(package)
        assert graph is not None
        assert not gone.parent.exists(), "what nobody will ask for is swept"
        data = graph.with_name("weights.bin")
        raw = data.read_bytes()
        for damaged in (raw[:-1], raw[:-1] + b"x"):
            data.write_bytes(damaged)
            assert ort_bake.ready(package) is None
        assert bake(package) == graph
        assert data.read_bytes() == raw
        monkeypatch.setattr(ort_bake, "cpu", lambda: "another")
        assert ort_bake.ready(package) is None
        other = bake(package)
        assert other is not None
        assert other.parent != graph.parent
        assert not graph.parent.exists()


def test_baking_needs_room_and_failing_leaves_nothing(
    made: dict[str, Path], baking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Package.open(made["plain"])) as package:
        prices = OrtPrices(package)
        assert bake(package, room=ort_bake.PROCESS + prices.baking_bytes - 1) is None
        assert bake(package, planned=prices.baked_bytes - 1) is None
        assert not baking.exists()
        with monkeypatch.context() as patch:
            patch.setattr(ort_bake.sys, "executable", "/bin/false")
            assert bake(package) is None
        with monkeypatch.context() as patch:
            patch.setattr(ort_bake.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
            assert bake(package) is None
        assert [f.name for f in baking.iterdir() if not f.name.endswith(".lock")] == []
        edge.load(made["plain"]).close()


# Prices


def weight(dtype: str, dims: tuple[int, ...], length: int) -> External:
    return External("w", dtype, dims, "data", 0, length)


N, K = 256, 512
NIBBLES, BYTES, FLOATS = N * K // 2, N * K, N * K * 4


@pytest.mark.parametrize(
    ("found", "use", "packed", "mapped"),
    [
        (weight("uint8", (N, K // 32, 16), NIBBLES), Use("MatMulNBits", 1, {"accuracy_level": 4}), N * K * 6 // 8, 0),
        (weight("uint8", (N, K // 32, 32), BYTES), Use("MatMulNBits", 1, {"accuracy_level": 4}), N * K * 10 // 8, 0),
        (weight("uint8", (N, K // 32, 16), NIBBLES), Use("MatMulNBits", 1, {}), NIBBLES, 0),
        (weight("uint8", (N, K // 32, 32), BYTES), Use("MatMulNBits", 1, {}), 0, BYTES),
        (weight("uint8", (4, N // 4, K // 2), NIBBLES), Use("QMoE", 2, {"expert_weight_bits": 4}), NIBBLES, 0),
        (weight("uint8", (4, N // 4, K), BYTES), Use("QMoE", 5, {"expert_weight_bits": 8}), N * K * 10 // 8, 0),
        (weight("int4", (K, N), NIBBLES), Use("DequantizeLinear", 0, {}), N * K * 6 // 8, 0),
        (weight("float32", (K, N), FLOATS), Use("MatMul", 1, {}), FLOATS, 0),
        (weight("float16", (N, K), FLOATS // 2), Use("Gemm", 1, {}), FLOATS, 0),
        (weight("float32", (4, K, N // 4), FLOATS), Use("MatMul", 1, {}), 0, FLOATS),
        (weight("float32", (4, N // 4, K), FLOATS), Use("MoE", 2, {}), 0, FLOATS),
        (weight("float32", (N, K // 32), N * K // 8), Use("MatMulNBits", 2, {}), 0, N * K // 8),
    ],
)
def test_how_weights_are_held(found: External, use: Use, packed: int, mapped: int) -> None:
    held = price_ort.held(found, [use])
    assert (held.packed, held.mapped, held.rows) == (packed, mapped, 0)


def test_of_a_table_only_rows_are_counted_and_no_more_than_there_are() -> None:
    table = weight("uint8", (1 << 18, 2048), 1 << 29)
    held = price_ort.held(table, [Use("GatherBlockQuantized", 0, {})])
    assert (held.packed, held.mapped, held.rows) == (0, 0, 2048)
    assert price_ort.touched(held, 16) == 16 * (4096 + price_ort.AROUND)
    assert price_ort.touched(held, 1 << 20) == 1 << 29
    columns = price_ort.held(table, [Use("Gather", 0, {"axis": 1})])
    assert (columns.mapped, columns.rows) == (1 << 29, 0)
    tied = price_ort.held(weight("float32", (N, K), FLOATS), [Use("Gather", 0, {}), Use("Gemm", 1, {})])
    assert (tied.packed, tied.rows) == (FLOATS, K * 4)


def test_nodes_and_their_weights_are_read_from_the_graph() -> None:
    nodes = [
        helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", accuracy_level=4, K=32, N=2),
        helper.make_node("Gather", ["b", "i"], ["z"], axis=1),
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph(nodes, "g", [value], [value]))
    found = price_ort.uses(model.SerializeToString(), "file")
    assert found["b"] == [Use("MatMulNBits", 1, {"accuracy_level": 4}), Use("Gather", 0, {"axis": 1})]
    assert found["s"] == [Use("MatMulNBits", 2, {"accuracy_level": 4})]


def test_caches_cost_what_their_kind_holds(made: dict[str, Path]) -> None:
    with closing(Package.open(made["gemma3n"])) as package, closing(Package.open(made["standard"])) as growing:
        full = price_ort.cache_bytes(package.contract, 64)
        windows = [cache for cache in package.contract.caches if cache.kind == "window"]
        assert {price_ort.capacity(cache, 64) for cache in windows} == {8 + price_ort.SPARE}
        assert {price_ort.capacity(cache, 10) for cache in windows} == {10}
        assert {price_ort.capacity(cache, 4) for cache in windows} == {8}
        assert price_ort.cache_bytes(growing.contract, 64) > full
        grown = next(cache for cache in growing.contract.caches if cache.span is None)
        latent = replace(growing.contract, caches=(replace(grown, kind="latent"),))
        assert price_ort.cache_bytes(latent, 64) == 64 * grown.heads * grown.dim * 4


# The toy, threads, pages


def test_the_toy_is_an_onnx_model() -> None:
    model = onnx.load_from_string(ort_start.toy())
    assert [node.op_type for node in model.graph.node][-1] == "Softmax"
    ort_start.warm_up()


def test_threads_are_those_of_the_cores_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert ort_start.thread_count() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert 1 <= ort_start.thread_count() <= (os.cpu_count() or 1)


def test_a_graph_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    from edge.engine.ort import open_session

    path = tmp_path / "model.onnx"
    path.write_bytes(b"nonsense")
    with pytest.raises(BadCheckpoint) as error:
        open_session(path, path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def resident(found: list[tuple[int, int]]) -> int:
    """Bytes of mappings that are in memory for this process."""
    starts, total, inside = {start for start, _ in found}, 0, False
    for text in Path("/proc/self/smaps").read_text().splitlines():
        first = text.split("-", 1)[0]
        if "-" in text.split(" ", 1)[0] and not text.startswith(("Vm", "THP")):
            inside = int(first, 16) in starts
        elif inside and text.startswith("Rss:"):
            total += int(text.split()[1]) * 1024
    return total


def test_touched_rows_are_given_back(tmp_path: Path) -> None:
    import mmap

    path = tmp_path / "table"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        assert ort_pages.mappings([(path, 0, 1 << 19)]) == [], "more of the file than the table"
        ort_pages.cool([(path, 0, 1 << 20)])
        pages = ort_pages.Pages([(path, 0, 1 << 20)], 4)
        assert len(pages.mapped) == 1
        for at in range(0, 1 << 20, 4096):
            assert mapped[at] == 0
        assert resident(pages.mapped) == 1 << 20
        pages.passed(3)
        assert resident(pages.mapped) == 1 << 20
        pages.passed(1)
        assert resident(pages.mapped) == 0
        assert mapped[77] == 0


def test_a_run_keeps_no_rows_of_earlier_passes(made: dict[str, Path]) -> None:
    with edge.load(made["gemma3n-int8"], context=16) as session:
        session.step(IDS[:16])
        found = session.engine.pages.mapped
        assert resident(found) == 0
        session.engine.relieve()


# The promise


@pytest.fixture(scope="module", name="heavy")
def heavy_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package with packed weights of 60 MB, so that they show beside the libraries."""
    home = tmp_path_factory.mktemp("heavy")
    config = {**LLAMA, "hidden_size": 768, "intermediate_size": 3072, "vocab_size": 4096, "num_hidden_layers": 5}
    (home / "config.json").write_text(json.dumps(config))
    write_random(home / "config.json", home / "model")
    with closing(open_source(home / "model")) as source:
        exported.export(source, home / "package", precision="int8", context=1024)
    shutil.rmtree(home / "model")
    yield home / "package"
    shutil.rmtree(home)


def test_claim_a_with_and_without_baked_weights(heavy: Path, tmp_path: Path) -> None:
    """Not a byte to spare: the first run has no room to bake, a run with room does, and then the first finds it."""
    found = plans(heavy, context=CONTEXT)
    with closing(Package.open(heavy)) as package, pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_CACHE", str(tmp_path))
        prices = OrtPrices(package)
        assert prices.packed_bytes >= ort_bake.LEAST
        env = environment(tmp_path)
        command = [sys.executable, "-m", "edge", "plan", str(heavy), "--budget", "40GB", "-c", str(CONTEXT), "--json"]
        planned = run(command, env)["candidates"]
        assert len(planned) == len({(p.ple, p.context) for p in found})
        budget = planned[0]["total_bytes"]
        first = run(line(heavy, budget), env)
        assert_kept(first, budget)
        assert ort_bake.ready(package) is None
        roomy = budget + ort_bake.PROCESS + prices.baking_bytes
        second = run(line(heavy, roomy), env)
        assert max(second["peak_bytes"], second["high"]) <= roomy
        assert ort_bake.ready(package) is not None
        third = run(line(heavy, budget), env)
        assert_kept(third, budget)
    assert first["tokens"] == second["tokens"] == third["tokens"]
    assert len(first["tokens"]) == CONTEXT - PROMPT
    assert third["anonymous_bytes"] < first["anonymous_bytes"] - prices.packed_bytes // 2


def test_the_floor_is_measured_in_a_process_without_torch(tmp_path: Path) -> None:
    env = {**os.environ, "EDGE_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "edge.budget.floor", "ort", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    found = json.loads(done.stdout)
    assert (found["engine"], found["on"], found["device"]) == ("ort", "cpu", 0)
    assert 40 << 20 < found["host"] < 160 << 20


def test_without_the_library_it_is_said(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edge.engine.ort_start", None)
    with pytest.raises(Unsupported, match="Install onnxruntime"):
        engines.start("ort", "cpu")


def test_a_session_gives_back_what_it_held(made: dict[str, Path]) -> None:
    session: Session = edge.load(made["plain"])
    session.step(IDS[:4])
    session.close()
    assert not hasattr(session.engine, "session")
    assert packages.weighty(session.checkpoint)
