"""``edge export``: packages that are whole, checked, described as they are; and nothing at all where anything fails."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

import edge
from edge.budget.price_ort import capacity
from edge.store.packages import open_source
from export import check, operators
from export import package as writing
from loaders.checkpoint import Checkpoint
from loaders.formats import manifest as manifests
from loaders.formats.package import Package
from loaders.network.matformer import sliced
from loaders.slices import resolve
from tests.command import Cli, cli_fixture, environment, refused  # noqa: F401
from tests.faulty import CHANGES, Faults, ended, forked, suicide, tiny, tree
from tests.faulty import command as silent
from tests.small import built, gemma3n_fixture, llama_fixture  # noqa: F401

SLICE = "half+skip-first-shared"
CONTEXT = 64
Make = Callable[..., Path]


@pytest.fixture(scope="module", name="made")
def made_fixture(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """(model, flags) -> a package, made by the command line when it is first asked for."""
    home, found = tmp_path_factory.mktemp("packages"), dict[tuple[str, ...], Path]()

    def made(model: str, *flags: str) -> Path:
        key = (model, *flags)
        if key not in found:
            folder = home / str(len(found))
            code, out, err = silent("export", built(model), "-o", folder, "-c", CONTEXT, *flags)
            assert (code, out) == (0, ""), err
            (home / f"{len(found)}.txt").write_text(err)
            found[key] = folder
        return found[key]

    return made


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / manifests.NAME).read_bytes())
    return found


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ONNX Runtime is asked for its operators: that takes longer than all the rest."""
    monkeypatch.setattr(operators, "optimized", lambda graphs: None)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
def test_a_package_is_whole_and_says_how_it_compared(made: Make, precision: str) -> None:
    before = tree(built("gemma3n"))
    folder = made("gemma3n", "--precision", precision)
    assert tree(built("gemma3n")) == before
    package = Package.open(folder)
    size = package.verify()
    assert package.source_slice.name == "full"
    assert (package.precision, package.context, package.profile) == (precision, CONTEXT, "ort")
    package.close()
    parity = manifest(folder)["parity"]
    assert 0 < parity["judged"] <= parity["tolerance"] == check.TOLERANCE[precision]
    assert (parity["tokens"], parity["past"], parity["not_past"]) == (CONTEXT, [8], [])
    assert set(parity["difference"]) >= {"decode", "every", "stepwise"}
    assert ("prefill" in parity["difference"]) == (precision != "float16")
    assert parity["runtime"].startswith("onnxruntime ")
    assert ("shipped" in parity) == (precision in ("int8", "int4"))
    line = folder.with_suffix(".txt").read_text()
    assert line.count("\n") == 1
    for word in (str(folder), "full", precision, f"{parity['judged']:.1e}", f"over {CONTEXT} tokens"):
        assert word in line
    if "shipped" in parity:
        assert parity["shipped"]["top1"] > 0.5
        assert parity["shipped"]["largest"] > parity["largest"]
        levels = {a.i for node in graph(folder).graph.node for a in node.attribute if a.name == "accuracy_level"}
        assert levels == {4}, "what was checked in exact arithmetic is shipped in the fast one"
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert size == written - (folder / manifests.NAME).stat().st_size


def graph(folder: Path) -> onnx.ModelProto:
    found: onnx.ModelProto = onnx.load(folder / "model.onnx", load_external_data=False)
    return found


def test_what_lies_in_a_package(made: Make) -> None:
    folder = made("gemma3n", "--precision", "int4")
    there = {path.name for path in folder.iterdir()}
    assert there == {
        "model.onnx", "model.onnx.data", "embedding.onnx", "ple.safetensors", "config.json", "tokenizer.json",
        "generation_config.json", "vocab.bin", "README.md", "required_operators.config", "manifest.json",
    }  # fmt: skip
    for name in ("tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (built("gemma3n") / name).read_bytes()
    assert (graph(folder).producer_name, graph(folder).ir_version) == ("edge", 10)
    listed = re.findall(r"^\* `(.+?)`:", (folder / "README.md").read_text(), re.M)
    assert set(listed) == there - {"manifest.json"}
    assert all((path.stat().st_mode & 0o777) == 0o666 & ~umask() for path in folder.iterdir())


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_slice_is_exported_as_the_smaller_model(made: Make) -> None:
    folder = made("gemma3n", "--precision", "int4", "--slice", SLICE)
    checkpoint, package = Checkpoint.open(built("gemma3n")), Package.open(folder)
    part = resolve(checkpoint.model, checkpoint.family, SLICE)
    small = sliced(checkpoint.model, part)
    assert (package.model.layers, package.source_slice) == (small.layers, part)
    assert package.facts.ple is not None
    assert package.facts.ple.layers == len(part.keep) < len(checkpoint.model.layers)
    assert package.facts.fingerprint == manifest(made("gemma3n", "--precision", "int4"))["fingerprint"]
    whole = Package.open(made("gemma3n", "--precision", "int4"))
    assert sum(w.length for w in package.weights_facts) < 0.9 * sum(w.length for w in whole.weights_facts)
    for source in (checkpoint, package, whole):
        source.close()


@pytest.mark.parametrize("model", ["gemma3n", "llama"])
def test_the_python_program_of_the_readme_is_greedy_as_edge_is(made: Make, model: str) -> None:
    folder = made(model, "--precision", "float32")
    text = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokens = json.loads(done.stdout)
    with edge.load(built(model), precision="float32", context=CONTEXT) as session:
        prompt = session.tokenizer.encode("Once upon a time")
        assert tokens[: len(prompt)] == prompt
        wanted = [event.token for event in session.generate(prompt, max_tokens=len(tokens) - len(prompt))]
    assert tokens[len(prompt) :] == [token for token in wanted if token is not None]
    assert len(tokens) == len(prompt) + 20


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        ("gemma3n", ("--precision", "float32"), "have the same length"),
        ("llama", ("--precision", "float32"), "filled up behind"),
        ("gemma3n", ("--precision", "float32", "--profile", "standard", "--no-check"), "filled up in front"),
    ],
)
def test_the_readme_says_how_a_batch_is_made(made: Make, model: str, flags: tuple[str, ...], said: str) -> None:
    text = (made(model, *flags) / "README.md").read_text()
    found = re.search(r"## Several sequences at once\n\n(.*?)\n\n##", text, re.S)
    assert found is not None
    assert said in found[1]


def test_a_context_of_one_token_is_checked_too(tmp_path: Path) -> None:
    code, out, err = silent("export", built("llama"), "-o", tmp_path / "p", "-c", 1, "--precision", "float32")
    assert (code, out) == (0, ""), err
    parity = manifest(tmp_path / "p")["parity"]
    assert (parity["tokens"], parity["decoded"]) == (1, 0)


def test_the_other_programs_use_the_names_that_are_there(made: Make) -> None:
    for model in ("gemma3n", "llama"):
        folder = made(model, "--precision", "float32")
        found = manifest(folder)
        text = (folder / "README.md").read_text()
        for language in ("kotlin", "swift"):
            code = re.search(rf"```{language}\n(.*?)```", text, re.S)
            assert code is not None
            plain = [name for name in found["inputs"] if not name.startswith("past_key_values.")]
            assert set(re.findall(r'inputs\["(\w+)"\]', code[1])) == set(plain)
            assert code[1].count("{") == code[1].count("}")
            assert str(found["outputs"]["logits"]["shape"][-1]) in code[1] or language == "kotlin"
            shapes = re.findall(r"1, (\d+), (\d+), (\d+)(?:\)\) }|], count: (\d+))", code[1])
            assert {tuple(map(int, s[:3])) for s in shapes} == {
                (c["heads"], min(CONTEXT, c["span"] + 16) if c["kind"] == "window" else CONTEXT, c["dim"])
                for c in found["caches"]
            }


def test_memory_is_that_of_the_files_and_the_buffers(made: Make) -> None:
    folder = made("gemma3n", "--precision", "int4")
    found, package = manifest(folder), Package.open(folder)
    buffers = sum(2 * c.heads * c.dim * 4 * capacity(c, CONTEXT) for c in package.contract.caches)
    package.close()
    assert list(found["memory"]) == [str(CONTEXT)]
    parts = found["memory"][str(CONTEXT)]["bytes"]
    assert parts["kv"] == buffers
    assert parts["weights"] == (folder / "model.onnx.data").stat().st_size
    assert sum(parts.values()) == found["memory"][str(CONTEXT)]["total_bytes"]


def test_required_operators_are_those_of_the_graph_as_it_is_run(made: Make) -> None:
    folder = made("gemma3n", "--precision", "int4")
    comment, *lines = (folder / operators.FILE).read_text().splitlines()
    listed = {(d, int(v), op) for d, v, ops in (line.split(";") for line in lines) for op in ops.split(",")}
    own = operators.operators(graph(folder))
    assert {(domain or "ai.onnx", opset, op) for domain, opset, op in own} <= listed
    assert ("com.microsoft", 1, "GroupQueryAttention") in listed
    assert ("ai.onnx", 21, "Gather") in listed
    assert "as ONNX Runtime" in comment
    nested = onnx.helper.make_graph([onnx.helper.make_node("Not", ["a"], ["b"])], "inner", [], [])
    outer = onnx.helper.make_graph([onnx.helper.make_node("If", ["c"], ["d"], then_branch=nested)], "g", [], [])
    model = onnx.helper.make_model(outer, opset_imports=[onnx.helper.make_opsetid("", 21)])
    assert operators.operators(model) == {("", 21, "If"), ("", 21, "Not")}


def test_without_an_onnx_runtime_operators_are_those_of_the_graph(
    cli: Cli, gemma3n: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "CHILD", "import no_such_library")
    done = cli("export", gemma3n, "-o", tmp_path / "new", "--no-check", "--json")
    assert done.code == 0, done.err
    assert (done.json["operators_of"], done.json["parity"]) == (None, None)
    assert "as they are; " in (tmp_path / "new" / operators.FILE).read_text()
    assert manifest(tmp_path / "new")["parity"] is None


@pytest.mark.usefixtures("plain")
def test_the_same_model_gives_the_same_bytes_from_a_checkpoint_and_from_a_pack(
    cli: Cli, gemma3n: Path, tmp_path: Path
) -> None:
    assert cli("pack", gemma3n, "-o", tmp_path / "pack", "-q").code == 0
    for name, source in (("a", gemma3n), ("b", tmp_path / "pack")):
        done = cli("export", source, "-o", tmp_path / name, "--precision", "int8", "--no-check", "-q")
        assert (done.code, done.out, done.err) == (0, "", "")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.usefixtures("plain")
def test_json_is_one_object_and_nothing_else(cli: Cli, llama: Path, tmp_path: Path) -> None:
    done = cli("export", llama, "-o", tmp_path / "new", "--json", "--no-check")
    assert (done.code, done.err) == (0, "")
    found, written = done.json, manifest(tmp_path / "new")
    assert found["package"] == str(tmp_path / "new")
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
    for key in ("precision", "head", "context", "memory", "parity", "opset", "min_ort", "graph"):
        assert found[key] == written[key]
    assert (found["precision"], found["head"], found["context"]) == ("int4", "int8", 2048)


def test_the_demo_is_exported_where_no_model_is_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge.demo, "model_path", lambda: built("llama"))
    done = cli("export", "-o", tmp_path / "new", "--no-check", "--precision", "float32")
    assert done.code == 0, done.err
    assert done.err.startswith("model: the demo")
    assert "not checked" in done.err
    assert Package.open(tmp_path / "new").model.family == "llama"


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("flags", "files"),
    [
        (("--profile", "standard", "--precision", "int4"), {"model.onnx", "model.onnx.data"}),
        (("--layout", "genai", "--precision", "int8"), {"model.onnx", "model.onnx.data", "genai_config.json"}),
        (("--layout", "web", "--precision", "int4"), {"onnx/model_q4.onnx", "onnx/model_q4.onnx_data"}),
    ],
)
def test_other_profiles_and_layouts_are_checked_alike(
    cli: Cli, one: Path, tmp_path: Path, flags: tuple[str, ...], files: set[str]
) -> None:
    done = cli("export", one, "-o", tmp_path / "new", "-c", CONTEXT, "--json", *flags)
    assert done.code == 0, done.err
    parity = done.json["parity"]
    assert 0 < parity["judged"] <= 1e-3
    assert parity["shipped"]["largest"] > 10 * parity["judged"], "exact arithmetic is asked for in every way there is"
    there = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert there >= files
    package = Package.open(tmp_path / "new")
    assert package.verify() > 0
    package.close()
    if "web" in flags:
        config = json.loads((tmp_path / "new" / "config.json").read_text())
        assert config["transformers.js_config"]["use_external_data_format"] == {"model_q4.onnx": 1}


# Refused


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--precision", "int2"), 2, ("--precision", "int2", "float16")),
        (("--precision", "bf16"), 2, ("--precision", "bf16")),
        (("-c", "0"), 2, ("--context", "0 tokens", "1 to 2048")),
        (("-c", "2049"), 2, ("--context", "2049 tokens")),
        (("--slice", "E9B"), 2, ("--slice", "E9B")),
        (("--profile", "other"), 2, ("--profile",)),
        (("--layout", "other"), 2, ("--layout",)),
    ],
)
def test_flags_that_make_no_sense(
    cli: Cli, gemma3n: Path, tmp_path: Path, flags: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    refused(cli("export", gemma3n, "-o", tmp_path / "new", *flags), code, *words)
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_not_touched(cli: Cli, gemma3n: Path, tmp_path: Path, made: Make) -> None:
    (tmp_path / "mine").write_text("mine")
    refused(cli("export", gemma3n, "-o", tmp_path / "mine"), 73, "mine", "already there")
    assert (tmp_path / "mine").read_text() == "mine"
    refused(cli("export", gemma3n, "-o", tmp_path), 73, "already there")
    refused(cli("export", gemma3n, "-o", tmp_path / "no" / "new", "--no-check"), 73, "no such file".capitalize())
    refused(cli("export", tmp_path / "none", "-o", tmp_path / "new"), 66, "none", "no such folder")
    package = made("llama", "--precision", "float32")
    refused(cli("export", package, "-o", tmp_path / "new"), 2, "an exported package")
    assert os.listdir(tmp_path) == ["mine"]


def test_a_pack_is_exported_at_what_it_holds(cli: Cli, gemma3n: Path, tmp_path: Path) -> None:
    assert cli("pack", gemma3n, "-o", tmp_path / "pack", "--precision", "int8", "-q").code == 0
    for precision in ("int4", "float32", "float16"):
        refused(cli("export", tmp_path / "pack", "-o", tmp_path / "new", "--precision", precision), 78, "holds int8")
    assert os.listdir(tmp_path) == ["pack"]


# Wrong


def doctored(real: Any) -> Any:
    """A lowering with a bug that only shows past the window."""

    def lower(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        for node in found.model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "local_window_size" and attribute.i > 0:
                    attribute.i -= 1
        return found

    return lower


@pytest.mark.usefixtures("plain")
def test_a_package_that_differs_is_not_written(
    cli: Cli, gemma3n: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "lower", doctored(writing.lower))
    args = ("export", gemma3n, "-o", tmp_path / "new", "--precision", "float32", "-c", CONTEXT)
    refused(cli(*args), 70, "check, ", "logits differ by", "of the largest", "--no-check")
    assert os.listdir(tmp_path) == []
    assert cli(*args, "--no-check").code == 0
    assert manifest(tmp_path / "new")["parity"] is None


# Cut off


def failing(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


QUICK = ("--no-check", "-q", "-c", CONTEXT, "--precision", "float32")


@pytest.fixture(scope="module", name="one")
def one_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer, quick to write."""
    return tiny(tmp_path_factory.mktemp("one") / "model")


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("at", [0, 1, 8, "fsync", "rename", "put"])
def test_a_disk_that_fills_up_leaves_nothing_behind(
    cli: Cli, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int | str
) -> None:
    before, real, calls = tree(one), os.pwrite, []

    def full(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        return failing() if isinstance(at, int) and len(calls) > at else real(fd, data, offset)

    if at == "put":
        monkeypatch.setattr(writing, "put", failing)
    elif isinstance(at, str):
        monkeypatch.setattr(os, at, failing)
    monkeypatch.setattr(os, "pwrite", full)
    refused(cli("export", one, "-o", tmp_path / "new", *QUICK), 74, "No space left")
    assert os.listdir(tmp_path) == []
    assert tree(one) == before


def test_a_disk_that_is_too_small_is_noticed_first(
    cli: Cli, gemma3n: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    args = ("export", gemma3n, "-o", tmp_path / "new", *QUICK)
    refused(cli(*args), 74, "disk full", "1000 bytes free")
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("where", ["writing", "checking"])
def test_an_interrupted_export_leaves_nothing_behind(
    cli: Cli, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def press(real: Any) -> Any:
        def pressed(*args: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            return real(*args)

        return pressed

    if where == "writing":
        monkeypatch.setattr(os, "pwrite", press(os.pwrite))
    else:
        monkeypatch.setattr(check, "observe", press(check.observe))
    done = cli("export", one, "-o", tmp_path / "new", "--precision", "float32", "-c", CONTEXT)
    assert (done.code, done.out, done.err.strip()) == (130, "", "")
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("plain")
def test_a_killed_export_leaves_no_package(one: Path, tmp_path: Path) -> None:
    """Killed at changes of the disk from the first to the last: what says it is a package is one."""
    before = tree(one)
    args = ("export", one, "-o", tmp_path / "new", *QUICK)
    counting = Faults(CHANGES, -1, suicide)
    with counting.here():
        assert silent(*args)[0] == 0
    whole, total = tree(tmp_path / "new"), counting.calls
    assert total > 20
    shutil.rmtree(tmp_path / "new")
    for nth in {*range(1, total + 1, max(1, total // 8)), total}:
        faults = Faults(CHANGES, nth, suicide)

        def work(faults: Faults = faults) -> int:
            with faults.here():
                return silent(*args)[0]

        assert ended(forked(work)) == -signal.SIGKILL
        if (tmp_path / "new").exists():
            assert tree(tmp_path / "new") == whole, "renamed, when all of it was there"
            shutil.rmtree(tmp_path / "new")
        assert all(name.startswith(".") for name in os.listdir(tmp_path))
        assert tree(one) == before
    assert silent(*args)[0] == 0
    assert tree(tmp_path / "new") == whole


def test_float16_means_matrices_and_caches(made: Make) -> None:
    folder = made("gemma3n", "--precision", "float16")
    source = open_source(folder)
    assert isinstance(source, Package)
    assert {cache.dtype for cache in source.contract.caches} == {"float16"}
    kinds = {w.dtype for w in source.weights_facts}
    assert len(kinds) == 2
    source.close()
    text = (folder / "README.md").read_text()
    assert "np.float16" in text
    assert "OnnxJavaType.FLOAT16" in text
    assert "swift" not in text, "its library has no such type"


def test_options_know_their_files() -> None:
    options = writing.Options("0", 64, "int4", layout="web")
    assert (options.graph, options.data) == ("onnx/model_q4.onnx", "model_q4.onnx_data")
    assert replace(options, layout="genai").data == "model.onnx.data"
