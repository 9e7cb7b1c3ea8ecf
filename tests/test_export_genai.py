"""Packages of layout genai in onnxruntime-genai itself: logits of prompts in pieces, greedy tokens, tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import edge
from edge.cli.export import quantized
from edge.session import open_source
from export import package
from loaders.network.matformer import full
from tests import makers
from tests.shrink import real, shrink
from tests.small import built

pytestmark = pytest.mark.slow

PIN = "onnxruntime-genai==0.18.0"
# Each family once; those among them that the runtime's own builder refuses or gets wrong, and two with per-layer
# embeddings, which it has for a multimodal model alone.
FAMILIES = (
    "llama-3.2-1B", "qwen3-0.6B", "olmo2-7B", "smollm3-3B", "qwen3-30B-A3B", "gemma-3-1B", "gemma-3-4B",
    "mistral-7B-v0.1", "moonlight-16B-A3B", "llama-4-scout-17B-16E", "gpt2", "gemma-3n-E2B", "gemma-4-E2B",
)  # fmt: skip
PIECES = (23, 9, 1, 1, 3, 1, 1, 1)
PROMPT, ANSWER = sum(PIECES), 24
PROGRAM = """
import json, sys
import numpy as np
import onnxruntime_genai as og

folder, out, ids, pieces, answer = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
model = og.Model(folder)

def generator(**options):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + answer, do_sample=False, **options)
    return og.Generator(model, params)

forced, rows, start = generator(), [], 0
for piece in pieces:
    forced.append_tokens(np.array(ids[start : start + piece], np.int32))
    rows.append(np.array(forced.get_logits()).reshape(-1))
    start += piece
np.save(out, np.stack(rows))
free = generator(no_repeat_ngram_size=2)
free.append_tokens(np.array(ids, np.int32))
while not free.is_done():
    free.generate_next_token()
print(json.dumps([int(token) for token in free.get_sequence(0)]))
"""
TOKENS = """
import json, sys
import onnxruntime_genai as og

tokenizer = og.Tokenizer(og.Model(sys.argv[1]))
texts = json.loads(sys.argv[2])
print(json.dumps([[int(i) for i in tokenizer.encode(text)] for text in texts]))
"""
Run = Callable[..., Any]


@pytest.fixture(scope="module", name="run")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """(program, arguments) -> what it prints, as data, in an environment that has the runtime and nothing of ours."""
    home = tmp_path_factory.mktemp("genai") / "venv"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", PIN], check=True)

    def run(program: str, *arguments: object) -> Any:
        words = [str(x) if isinstance(x, Path) else json.dumps(x) for x in arguments]
        done = subprocess.run([python, "-c", program, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return run


def checkpoint(folder: Path, name: str) -> Path:
    raw = shrink(real(name))
    if "kv_lora_rank" in raw:
        raw["kv_lora_rank"] = 24  # with the rotated part a multiple of 8, as the published ones are
    folder.mkdir()
    return makers.make(folder, raw)


def export(model: Path, folder: Path, precision: str) -> Path:
    """A package, int4 with activations as they are: near ties then fall as in the reference."""
    source = open_source(model)
    options = package.Options("0", min(PROMPT + ANSWER, source.model.context), precision, layout="genai")
    weights = quantized(source, precision, True, lambda *_: None)

    def exactly(_: Path, exact: Callable[[bool], None]) -> dict[str, Any]:
        exact(True)
        return {}

    package.write(weights, full(source.model), folder, options, exactly if precision == "int4" else None)
    for opened in {id(weights): weights, id(source): source}.values():
        opened.close()
    return folder


def greedy(model: edge.Session, ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """``ids`` and the likeliest next tokens, of those that do not repeat a pair."""
    found = list(ids)
    while len(found) < len(ids) + ANSWER and not (len(found) > len(ids) and found[-1] in stops):
        logits = model.logits(np.array(found))[-1].copy()
        logits[[b for a, b in pairwise(found) if a == found[-1]]] = -np.inf
        found.append(int(logits.argmax()))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_genai_generates_the_models_own_tokens(run: Run, tmp_path: Path, name: str) -> None:
    model = checkpoint(tmp_path / "model", name)
    for precision in ("float32", "int4"):
        folder = export(model, tmp_path / precision, precision)
        config = json.loads((folder / "genai_config.json").read_bytes())["model"]
        ids = [int(i) for i in np.random.default_rng(3).integers(3, config["vocab_size"], PROMPT)]
        tokens = run(PROGRAM, folder, tmp_path / f"{precision}.npy", ids, PIECES, ANSWER)
        with edge.load(model, precision=precision, slice="full", kv="float32") as session:
            wanted = session.logits(np.array(ids))[np.cumsum(PIECES) - 1]
            makers.assert_close(np.load(tmp_path / f"{precision}.npy"), wanted)
            # Where a model names nothing to stop at, the runtime stops at what it pads with.
            assert tokens == greedy(session, ids, config.get("eos_token_id", [config["pad_token_id"]]))
        assert len(set(tokens[PROMPT:])) > 4, "too dull to tell"


def test_genai_reads_the_tokenizer(run: Run, tmp_path: Path) -> None:
    folder = export(built("llama"), tmp_path / "package", "float32")
    texts = ["once upon a time", "ça coûte 3 €, 日本語 🎉", "the model<end_of_turn>\n\n turn"]
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Unless it is told otherwise it leaves what begins a text to whoever writes the prompt.
    assert run(TOKENS, folder, texts) == [own.encode(text, add_special_tokens=False).ids for text in texts]
