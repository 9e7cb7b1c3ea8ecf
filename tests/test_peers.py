"""The benchmark beside other engines: what it writes for them, what it asks of an engine, what its table says."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers, peers_gguf, peers_measure
from loaders.formats.recipe import recipes, stored_as, stored_bytes
from loaders.network.spec import Model
from loaders.network.tensors import PLE_TABLE, tensors
from loaders.sketch import sketch

SCALARS = {peers_gguf.UINT32: "<I", peers_gguf.FLOAT32: "<f", peers_gguf.BOOL: "<?"}


def model_of(name: str) -> Model:
    return sketch(peers.CONFIGS / f"{name}.json").model


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
        if kind == peers_gguf.STRING:
            return self.text()
        if kind == peers_gguf.ARRAY:
            inner, count = self.take("<IQ")
            return [self.value(inner) for _ in range(count)]
        return self.take(SCALARS[kind])[0]

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        dims = self.take(f"<{self.take('<I')[0]}Q")
        return dims, *self.take("<IQ")


@pytest.mark.parametrize("name", list(peers.CASES))
def test_a_file_for_llama_cpp_reads_as_many_bytes_a_token_as_a_pack(name: str) -> None:
    model, recipe = model_of(name), recipes("int4")[0]
    wanted = sum(
        stored_bytes(shape, stored_as(tensor, shape, recipe))
        for tensor, shape in tensors(model).items()
        if tensor != PLE_TABLE
    )
    extra = {entry.nbytes for gguf, entry in peers_gguf.entries(model).items() if gguf == "rope_freqs"}
    assert peers_gguf.bytes_per_token(model) == wanted + sum(extra)


@pytest.mark.parametrize("name", list(peers.CASES))
def test_the_header_names_every_tensor_where_it_will_lie(name: str) -> None:
    model = model_of(name)
    table = peers_gguf.entries(model)
    data = peers_gguf.header(peers_gguf.metadata(model), table)
    found, end = Reader(data), 0
    assert len(data) % peers_gguf.ALIGNMENT == 0
    assert 0 <= len(data) - found.at < peers_gguf.ALIGNMENT
    assert found.keys["general.architecture"] == model.family
    assert found.keys[f"{model.family}.block_count"] == len(model.layers)
    assert found.keys[f"{model.family}.attention.layer_norm_rms_epsilon"] == pytest.approx(model.eps)
    assert list(found.tensors) == [f"{gguf}.weight" for gguf in table]
    for (dims, kind, at), entry in zip(found.tensors.values(), table.values(), strict=True):
        assert dims == entry.shape[::-1]
        assert kind == peers_gguf.FORMATS[entry.stored][0]
        assert at % peers_gguf.ALIGNMENT == 0
        assert 0 <= at - end < peers_gguf.ALIGNMENT
        end = at + entry.nbytes


def test_gemma_3n_has_what_its_architecture_asks_for() -> None:
    table, keys = peers_gguf.entries(model_of("gemma-3n-E2B")), peers_gguf.metadata(model_of("gemma-3n-E2B"))
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
    peers_gguf.write(small, tmp_path / "small.gguf")
    data = (tmp_path / "small.gguf").read_bytes()
    found = Reader(data)
    begin = -(-found.at // peers_gguf.ALIGNMENT) * peers_gguf.ALIGNMENT
    ends = [at + math.prod(dims) // values * size for dims, kind, at in found.tensors.values()
            for number, values, size in peers_gguf.FORMATS.values() if number == kind]  # fmt: skip
    assert 0 <= len(data) - begin - max(ends) < peers_gguf.ALIGNMENT


class Counting:
    """An engine that only keeps count."""

    def __init__(self) -> None:
        self.fed, self.most, self.calls = 0, 0, [0]

    def feed(self, ids: Sequence[int]) -> None:
        assert 0 < len(ids) <= peers_measure.AT_ONCE
        assert all(0 <= i < 1000 for i in ids)
        self.fed += len(ids)
        self.most = max(self.most, self.fed)
        self.calls.append(self.fed)

    def reset(self) -> None:
        self.fed = 0


@pytest.mark.parametrize("name", list(peers.CASES))
def test_what_is_asked_of_an_engine_fits_in_its_context(name: str) -> None:
    case = peers.CASES[name]
    what = replace(case.asked(model_of(name), 2), vocab=1000)
    engine = Counting()
    found = peers_measure.measure(engine, what)
    assert engine.most == max(case.long + case.new if case.long else 0, case.short + case.new, case.prompt)
    assert engine.most <= what.context
    assert {case.short, case.prompt, case.long} <= {*engine.calls}
    assert ("long_tps" in found) == bool(case.long)
    assert found["peak_bytes"] >= found["anonymous_bytes"] > 0


def line(
    engine: str, speeds: Sequence[float], run: str = "2026-01-01 00:00:00", case: str = "qwen3-0.6B"
) -> dict[str, Any]:
    turns = [
        {"prefill_tps": x * 10, "decode_tps": x, "read_gbps": 20.0, "others": 0.0, "wall_s": 1.0, "load_s": 1.0,
         "peak_bytes": 10**9, "anonymous_bytes": 10**8, "file_bytes": 9 * 10**8, "version": engine, "plan": ""}
        for x in speeds
    ]  # fmt: skip
    facts = {"threads": 2, "bytes_per_token": 10**9, "machine": "a machine", "run": run}
    return peers.summed(peers.CASES[case], engine, turns, facts)


def test_ratios_are_of_turns_that_followed_each_other() -> None:
    edge, peer = line("native", [10.0, 4.0, 2.0]), line("llama.cpp", [5.0, 4.0, 1.0])
    assert edge["decode_tps"] == 4.0
    assert peers.ratio(edge, peer, "decode_tps") == 2.0
    assert peers.ratio(edge, peer, "long_tps") is None
    assert peers.ratio(edge, None, "decode_tps") is None
    assert peers.ratio(edge, {**peer, "run": "another"}, "decode_tps") is None


def test_the_table_has_a_row_for_each_and_says_how_it_came_about() -> None:
    edge, peer = line("native", [10.0, 4.0, 2.0]), line("llama.cpp", [5.0, 4.0, 1.0])
    text = peers.peers_table([edge, peer])
    assert (
        "| qwen3-0.6B | edge, native | 40.0 | 2.00x | 4.0 | 2.00x |  |  | 1,000 MB, 100 own | 4.0 of 20 GB/s |" in text
    )
    assert "| qwen3-0.6B | llama.cpp | 40.0 |  | 4.0 |  |" in text
    assert "Medians of 3 processes" in text
    assert "cores busy" not in text
    peer["runs"][0]["others"] = 1.5
    assert "up to 1.5 cores busy" in peers.peers_table([edge, peer])
    assert peers.peers_table([]) == "Not measured yet."


def test_new_lines_take_the_place_of_old_ones() -> None:
    old = [line("torch", [1.0]), line("llama.cpp", [1.0]), line("llama.cpp", [1.0], case="llama-3.2-1B")]
    found = peers.merged(old, [line("torch", [2.0]), line("native", [3.0])])
    assert [(x["case"], x["engine"], x["decode_tps"]) for x in found] == [
        ("llama-3.2-1B", "llama.cpp", 1.0),
        ("qwen3-0.6B", "native", 3.0),
        ("qwen3-0.6B", "torch", 2.0),
        ("qwen3-0.6B", "llama.cpp", 1.0),
    ]
