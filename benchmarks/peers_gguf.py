"""A GGUF file of random weights at the shapes of a configuration, for llama.cpp: tensor by tensor the format of edge's.

int4 is Q4_0 and int8 Q8_0, blocks of the same sizes; float32 stays. The same few megabytes of random blocks are written
again and again: how fast they are multiplied does not depend on what they hold. There is no tokenizer in the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from loaders.formats.quant import BITS, BLOCK
from loaders.formats.recipe import recipes, stored_as
from loaders.network.spec import Attention, Gated, Model
from loaders.network.tensors import PLE_TABLE, head, tensors

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
# What ggml calls the formats: its number, values of a block, bytes of one.
FORMATS = {"F32": (0, 1, 4), "int4": (2, BLOCK, 2 + BLOCK // 2), "int8": (8, BLOCK, 2 + BLOCK)}
# What a file of mostly such tensors says it is.
Q4_0 = 2
# Types of metadata.
UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
# Standard deviations of codes that are all equally likely, in units of the scale.
DEVIATION = {"int4": 4.61, "int8": 73.9}
POOL_BLOCKS = 1 << 18
# Blocks of the pool from where one tensor begins to where the next does: who finds two that are equal may keep one.
APART = 7919
WHOLE = {
    "embed": "token_embd",
    "head": "output",
    "norm": "output_norm",
    PLE_TABLE: "per_layer_token_embd",
    "ple.proj": "per_layer_model_proj",
    "ple.norm": "per_layer_proj_norm",
}
LAYER = {
    **{f"attn.{x}": f"attn_{x}" for x in ("q", "k", "v", "q_norm", "k_norm")},
    "attn.o": "attn_output",
    **{f"ffn.{x}": f"ffn_{x}" for x in ("gate", "up", "down")},
    "norm.attn_in": "attn_norm",
    "norm.attn_out": "post_attention_norm",
    "norm.ffn_in": "ffn_norm",
    "norm.ffn_out": "post_ffw_norm",
    "laurel.left": "laurel_l",
    "laurel.right": "laurel_r",
    "laurel.norm": "laurel_post_norm",
    "altup.router": "altup_router",
    "altup.norm": "altup_router_norm",
    "altup.predict": "altup_predict_coef",
    "altup.correct": "altup_correct_coef",
    "altup.scale": "altup_correct_scale",
    "ple.gate": "inp_gate",
    "ple.proj": "proj",
    "ple.norm": "post_norm",
}
STACKS = {"altup.expand.": "altup_proj", "altup.merge.": "altup_unembd_proj"}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file, shape as edge has it, [out, in]. ``read``: whether every token reads all of it."""

    shape: tuple[int, ...]
    stored: str
    read: bool = True

    @property
    def nbytes(self) -> int:
        """In the file, without padding."""
        _, values, size = FORMATS[self.stored]
        return math.prod(self.shape) // values * size


def entries(model: Model) -> dict[str, Entry]:
    """GGUF name -> tensor, at edge's int4 recipe. The files want keys' and values' weights of every layer.

    Raises KeyError for a mechanism that has no name here.
    """
    recipe = recipes("int4")[0]
    found: dict[str, Entry] = {}
    for name, shape in tensors(model).items():
        stored = "int8" if name == PLE_TABLE else stored_as(name, shape, recipe)
        stack = next((gguf for prefix, gguf in STACKS.items() if name.startswith(prefix)), None)
        if stack is not None:
            before = found[stack].shape[0] if stack in found else 0
            found[stack] = Entry((before + 1, *shape), stored)
        elif name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            found[f"blk.{i}.{LAYER[rest]}"] = Entry(shape, stored)
        else:
            rows = (model.vocab, *shape[1:]) if name == PLE_TABLE else shape
            found[WHOLE[name]] = Entry(rows, stored, name == head(model) or name not in ("embed", PLE_TABLE))
    for at, layer in enumerate(model.layers):
        if layer.attention.kv_from is not None:
            for part in ("attn_k", "attn_v", "attn_k_norm"):
                found[f"blk.{at}.{part}"] = replace(found[f"blk.0.{part}"], read=False)
    rope = _attention(model, 0).rope
    if rope is not None and rope.scaling is not None:
        found["rope_freqs"] = Entry((rope.dim // 2,), "F32")
    return found


def bytes_per_token(model: Model) -> int:
    """Weights that a decoded token reads."""
    return sum(entry.nbytes for entry in entries(model).values() if entry.read)


def metadata(model: Model) -> dict[str, Any]:
    """What llama.cpp asks of a file of the model's architecture: int, float, bool, str, or a list of one of them."""
    a, ffn = _attention(model, 0), model.layers[0].ffn
    assert isinstance(ffn, Gated)
    full = next(layer.attention for layer in model.layers if layer.attention.window is None)
    assert isinstance(full, Attention)
    assert full.rope is not None
    keys: dict[str, Any] = {
        "vocab_size": model.vocab,
        "context_length": model.context,
        "embedding_length": model.dim,
        "block_count": len(model.layers),
        "feed_forward_length": ffn.width,
        "attention.head_count": a.heads,
        "attention.head_count_kv": a.kv_heads,
        "attention.key_length": a.head_dim,
        "attention.value_length": a.head_dim,
        "attention.layer_norm_rms_epsilon": model.eps,
        "rope.freq_base": full.rope.theta,
        "rope.dimension_count": full.rope.dim,
    }
    if a.window is not None:
        assert a.rope is not None
        keys["attention.sliding_window"] = a.window
        keys["attention.sliding_window_pattern"] = [layer.attention.window is not None for layer in model.layers]
        keys["rope.freq_base_swa"] = a.rope.theta
    if model.ple is not None:
        keys["embedding_length_per_layer_input"] = model.ple.dim
        keys["attention.shared_kv_layers"] = sum(layer.attention.kv_from is not None for layer in model.layers)
    if model.altup is not None:
        keys["altup.num_inputs"], keys["altup.active_idx"] = model.altup.streams, model.altup.active
    named = {f"{model.family}.{key}": value for key, value in keys.items()}
    return {"general.architecture": model.family, "general.file_type": Q4_0, **named, "tokenizer.ggml.model": "none"}


def write(model: Model, path: Path) -> None:
    """The whole file, a few seconds a gigabyte."""
    table, draw = entries(model), np.random.default_rng(0)
    pools: dict[tuple[str, int], bytes] = {}
    with path.open("wb") as file:
        file.write(header(metadata(model), table))
        for i, entry in enumerate(table.values()):
            file.write(bytes(-file.tell() % ALIGNMENT))
            if entry.stored == "F32":
                file.write(_floats(draw, entry))
                continue
            key = (entry.stored, entry.shape[-1])
            if key not in pools:
                pools[key] = _blocks(draw, *key)
            _repeat(file, pools[key], i * APART * FORMATS[entry.stored][2], entry.nbytes)
        file.write(bytes(-file.tell() % ALIGNMENT))


def header(keys: Mapping[str, Any], table: Mapping[str, Entry]) -> bytes:
    """All before the tensors' data."""
    out = [MAGIC, struct.pack("<IQQ", VERSION, len(table), len(keys))]
    for key, value in keys.items():
        out += [_text(key), *_value(value)]
    at = 0
    for name, entry in table.items():
        sizes = entry.shape[::-1]
        out += [_text(f"{name}.weight"), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        out.append(struct.pack("<IQ", FORMATS[entry.stored][0], at))
        at += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
    size = sum(map(len, out))
    return b"".join([*out, bytes(-size % ALIGNMENT)])


def _value(value: Any) -> Iterator[bytes]:
    """Type, then value."""
    kind = _kind(value)
    yield struct.pack("<I", kind)
    if isinstance(value, list):
        yield struct.pack("<IQ", _kind(value[0]), len(value))
        for item in value:
            yield from list(_value(item))[1:]
    elif isinstance(value, str):
        yield _text(value)
    else:
        yield struct.pack({UINT32: "<I", FLOAT32: "<f", BOOL: "<?"}[kind], value)


def _kind(value: Any) -> int:
    return {int: UINT32, float: FLOAT32, bool: BOOL, str: STRING, list: ARRAY}[type(value)]


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _blocks(draw: np.random.Generator, stored: str, cols: int) -> bytes:
    """POOL_BLOCKS random blocks, whose values keep what flows between layers near one."""
    _, _, size = FORMATS[stored]
    blocks = draw.integers(0, 256, (POOL_BLOCKS, size), np.uint8)
    scale = np.float16(cols**-0.5 / DEVIATION[stored])
    blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    data: bytes = blocks.tobytes()
    return data


def _floats(draw: np.random.Generator, entry: Entry) -> bytes:
    """Vectors near one; small matrices as wide as blocks would be."""
    shape = entry.shape
    if len(shape) == 1:
        return np.ones(shape, np.float32).tobytes()
    return (draw.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32).tobytes()


def _repeat(file: BinaryIO, pool: bytes, start: int, size: int) -> None:
    """``size`` bytes of the pool, over and over, from ``start`` on."""
    while size:
        part = pool[start % len(pool) :][:size]
        file.write(part)
        start, size = 0, size - len(part)


def _attention(model: Model, i: int) -> Attention:
    found = model.layers[i].attention
    assert isinstance(found, Attention)
    return found


assert set(DEVIATION) == set(BITS)
