"""A GGUF file of random weights at the shapes of a configuration, for llama.cpp: tensor by tensor the format of edge's.

int4 is Q4_0 and int8 Q8_0, blocks of the same sizes; float32 stays. The same few megabytes of random blocks are written
again and again: how fast they are multiplied does not depend on what they hold. There is no tokenizer in the file.
"""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from loaders.errors import ReadFailed, Unsupported
from loaders.formats.quant import BITS, BLOCK
from loaders.formats.recipe import recipes, stored_as
from loaders.network.spec import Attention, Gated, Layer, Linear, Llama3Scaling, Model
from loaders.network.tensors import PLE_TABLE, head, tensors

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
PEER = "llama.cpp"
# The architecture that the program is named after: norms before, rotary positions, a gate, and nothing else.
PLAIN = PEER.partition(".")[0]
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

    Raises Unsupported for a mechanism that has no name here.
    """
    try:
        return _entries(model)
    except KeyError as missing:
        raise _refused(model, f"has {missing.args[0]}") from None


def _entries(model: Model) -> dict[str, Entry]:
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
    rope = _full(model).rope
    if rope is not None and rope.scaling is not None and not isinstance(rope.scaling, Llama3Scaling | Linear):
        raise _refused(model, f"stretches positions by {type(rope.scaling).__name__}")
    if rope is not None and isinstance(rope.scaling, Llama3Scaling):
        found["rope_freqs"] = Entry((rope.dim // 2,), "F32")
    return found


def bytes_per_token(model: Model) -> int:
    """Weights that a decoded token reads."""
    return sum(entry.nbytes for entry in entries(model).values() if entry.read)


def metadata(model: Model) -> dict[str, Any]:
    """What llama.cpp asks of a file of the model's architecture: int, float, bool, str, or a list of one of them.

    Raises Unsupported.
    """
    a, ffn, full = _attention(model, 0), model.layers[0].ffn, _full(model)
    if not isinstance(ffn, Gated) or full.rope is None:
        raise _refused(model, "has no gate" if full.rope is not None else "has no rotary positions")
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
    if isinstance(full.rope.scaling, Linear):
        keys["rope.scaling.type"], keys["rope.scaling.factor"] = "linear", full.rope.scaling.factor
    if a.window is not None and a.rope is not None:
        keys["attention.sliding_window"] = a.window
        keys["attention.sliding_window_pattern"] = [layer.attention.window is not None for layer in model.layers]
        keys["rope.freq_base_swa"] = a.rope.theta
    if model.ple is not None:
        keys["embedding_length_per_layer_input"] = model.ple.dim
        keys["attention.shared_kv_layers"] = sum(layer.attention.kv_from is not None for layer in model.layers)
    if model.altup is not None:
        keys["altup.num_inputs"], keys["altup.active_idx"] = model.altup.streams, model.altup.active
    name = architecture(model)
    named = {f"{name}.{key}": value for key, value in keys.items()}
    return {"general.architecture": name, "general.file_type": Q4_0, **named, "tokenizer.ggml.model": "none"}


def architecture(model: Model) -> str:
    """What llama.cpp calls it: by the family's name, but for the models that do nothing beyond its first."""
    a, ffn = _attention(model, 0), model.layers[0].ffn
    if a.rope is None or not isinstance(ffn, Gated) or ffn != Gated(ffn.width, "silu"):
        return model.family
    plain = Layer(Attention(a.heads, a.kv_heads, a.head_dim, a.head_dim**-0.5, a.rope), ffn)
    alone = Model("", model.vocab, model.dim, (plain,) * len(model.layers), model.eps, model.tied, model.context)
    return PLAIN if replace(model, family="") == alone else model.family


def nbytes(model: Model) -> int:
    """Of the whole file."""
    table = entries(model)
    return len(header(metadata(model), table)) + sum(_padded(entry.nbytes) for entry in table.values())


def write_header(model: Model, path: Path) -> None:
    """A file that says what a whole one says, and is as long, but takes no room: there is nothing in its tensors."""
    with _written(path) as file:
        file.write(header(metadata(model), entries(model)))
        file.truncate(nbytes(model))


def write(model: Model, path: Path) -> None:
    """The whole file, a few seconds a gigabyte. Raises Unsupported, ReadFailed for a disk that is full."""
    table, keys, draw = entries(model), metadata(model), np.random.default_rng(0)
    pools: dict[tuple[str, int], bytes] = {}
    with _written(path) as file:
        free, size = shutil.disk_usage(path.parent).free, nbytes(model)
        if size > free:
            raise ReadFailed(f"disk full: needs {size} bytes, has {free} bytes free", file=path.parent)
        file.write(header(keys, table))
        for i, entry in enumerate(table.values()):
            if entry.stored == "F32":
                file.write(_floats(draw, entry))
            else:
                key = (entry.stored, entry.shape[-1])
                if key not in pools:
                    pools[key] = _blocks(draw, *key)
                _repeat(file, pools[key], i * APART * FORMATS[entry.stored][2], entry.nbytes)
            file.write(bytes(-file.tell() % ALIGNMENT))


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file that is there when the block ends well, and not when it does not."""
    try:
        with path.open("wb") as file:
            yield file
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ReadFailed(error.strerror or type(error).__name__, file=path) from None
        raise


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
        at += _padded(entry.nbytes)
    size = sum(map(len, out))
    return b"".join([*out, bytes(-size % ALIGNMENT)])


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


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
    data: bytes = (draw.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32).tobytes()
    return data


def _repeat(file: BinaryIO, pool: bytes, start: int, size: int) -> None:
    """``size`` bytes of the pool, over and over, from ``start`` on."""
    while size:
        part = pool[start % len(pool) :][:size]
        file.write(part)
        start, size = 0, size - len(part)


def _attention(model: Model, i: int) -> Attention:
    found = model.layers[i].attention
    if not isinstance(found, Attention):
        raise _refused(model, "has latent attention")
    return found


def _full(model: Model) -> Attention:
    """Of the first layer that sees everything."""
    for i, layer in enumerate(model.layers):
        if layer.attention.window is None:
            return _attention(model, i)
    raise _refused(model, "has a window in every layer")


def _refused(model: Model, why: str) -> Unsupported:
    return Unsupported(f"{model.family} {why}, which is not written for {PEER}", hint=f"Leave out --against {PEER}")


assert set(DEVIATION) == set(BITS)
