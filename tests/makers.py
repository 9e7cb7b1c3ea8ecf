"""Checkpoint folders made by transformers' own classes, with random weights that leave no mechanism idle.

transformers starts norms at one and AltUp's output scale at zero: a model that ignored them would pass. Here norms
lie between 0.4 and 1.5, the output scale is random, and AltUp's coefficients mix the streams for real.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma4ForCausalLM,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    SmolLM3ForCausalLM,
)

CLASSES: dict[str, type[PreTrainedModel]] = {
    "gemma3n_text": Gemma3nForCausalLM,
    "llama": LlamaForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "smollm3": SmolLM3ForCausalLM,
    "olmo2": Olmo2ForCausalLM,
    "mistral": MistralForCausalLM,
    "gpt2": GPT2LMHeadModel,
    "gemma3_text": Gemma3ForCausalLM,
    "gemma4_text": Gemma4ForCausalLM,
    "llama4_text": Llama4ForCausalLM,
    "deepseek_v3": DeepseekV3ForCausalLM,
    "kimi_k2": DeepseekV3ForCausalLM,
}
TOLERANCE = 1e-4
Tensors = dict[str, torch.Tensor]


def make(
    folder: Path,
    raw: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "50GB",
    saved_config: bool = False,
    seed: int = 0,
    change: Callable[[Tensors], Tensors] | None = None,
) -> Path:
    """Writes a checkpoint for ``raw``; its config.json is ``raw`` itself, or what transformers saves.

    ``change`` rewrites the tensors of an unsharded folder before they are stored.
    """
    kind, config = theirs(raw)
    model = kind(config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    if not saved_config:
        (folder / "config.json").write_text(json.dumps(raw, indent=2))
    if change is not None:
        edit(folder, change)
    return folder


def theirs(raw: dict[str, Any]) -> tuple[type[PreTrainedModel], Any]:
    """transformers' class for a config, and the config as it reads it: of the text part, weights as they are."""
    text = copy.deepcopy(raw.get("text_config", raw))
    kind = CLASSES[text.pop("model_type")]
    text.pop("quantization_config", None)
    return kind, kind.config_class.from_dict(text)


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Deterministic weights of the size a trained model's have, and none at its initial value."""
    generator = torch.Generator().manual_seed(seed)

    # What a norm's weight is short of: Gemma 3 stores w of 1 + w.
    lack = 1.0 if model.config.model_type == "gemma3_text" else 0.0
    parameters = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, p in (*model.named_parameters(), *model.named_buffers()):
            how = next((how for pattern, how in WEIGHTS if re.search(pattern, name)), None)
            if isinstance(how, tuple):
                low, high = (x - lack for x in how)
                p.data.copy_(torch.rand(p.shape, generator=generator) * (high - low) + low)
            elif how is not None or name in parameters:
                deviation = how or p.shape[-2 if turned(model, name, p) else -1] ** -0.5
                p.data.copy_(torch.randn(p.shape, generator=generator) * deviation)


# By name, the first that matches: uniform between two values, or normal with a deviation; matrices by their inputs.
WEIGHTS: tuple[tuple[str, tuple[float, float] | float], ...] = (
    # Gemma 3n does not scale its scores: larger weights would make every softmax a maximum.
    (r"(q_norm|k_norm)\.weight$", (0.4, 1.0)),
    (r"\.bias$", 0.3),
    (r"norm|\.ln_", (0.5, 1.5)),
    (r"layer_scalar$", (0.8, 1.2)),  # smaller ones forget the first layers and amplify rounding
    (r"e_score_correction_bias$", 0.2),
    (r"correct_output_scale$", 1.0),
    (r"modality_router\.weight$", 4.0),  # its input is divided by the whole width
    (r"prediction_coefs\.weight$", 0.05),  # the streams grow by this layer after layer, and rounding errors with them
    (r"correction_coefs\.weight$", 0.3),
    (r"embed_tokens_per_layer\.weight$", 0.4),
    (r"(embed_tokens|lm_head|wte|wpe)\.weight$", 0.7),
)


def turned(model: PreTrainedModel, name: str, p: torch.Tensor) -> bool:
    """Most matrices are [out, in]; Llama 4's experts and GPT-2's are stored the other way round."""
    return (p.ndim == 3 and model.config.model_type == "llama4_text") or ".c_" in name


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Rewrites the tensors of an unsharded folder."""
    path = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path, {"format": "pt"})


def variant(source: Path, folder: Path, change: Callable[[Tensors], Tensors], **keys: Any) -> Path:
    """A copy of an unsharded folder with other tensors, and with keys of its config set as :func:`set_config` does."""
    shutil.copytree(source, folder)
    edit(folder, change)
    return set_config(folder, **keys) if keys else folder


def set_config(folder: Path, **keys: Any) -> Path:
    """Sets keys of config.json; ``...`` removes one."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return folder


def prefixed(prefix: str, head: str = "lm_head.weight") -> Callable[[Tensors], Tensors]:
    """Text tensors under another prefix than ``model.``; a head is stored as ``head``."""

    def change(tensors: Tensors) -> Tensors:
        return {
            head if name == "lm_head.weight" else prefix + name.removeprefix("model."): t for name, t in tensors.items()
        }

    return change


def multimodal(fill: float = 7.0) -> Callable[[Tensors], Tensors]:
    """The names of the published upload, with stand-ins for the towers: :func:`tower_bytes` of them."""

    def change(tensors: Tensors) -> Tensors:
        return {**prefixed("model.language_model.")(tensors), **towers(fill)}

    return change


def towers(fill: float) -> Tensors:
    """A few tensors of the vision and audio parts, with the ranks that the real ones have."""
    shapes = {
        "model.vision_tower.timm_model.conv_stem.conv.weight": (4, 3, 3, 3),
        "model.vision_tower.timm_model.blocks.0.0.bn1.weight": (4,),
        "model.audio_tower.conformer.0.attention.attn.q_proj.weight": (6, 6),
        "model.audio_tower.subsample_conv_projection.conv_0.norm.weight": (5,),
        "model.embed_vision.embedding.weight": (8, 6),
        "model.embed_vision.embedding_projection.weight": (6, 8),
        "model.embed_audio.hard_embedding_norm.weight": (6,),
    }
    return {name: torch.full(shape, fill, dtype=torch.float16) for name, shape in shapes.items()}


def tower_bytes() -> int:
    """Bytes of :func:`towers`."""
    return sum(t.nbytes for t in towers(0.0).values())


def tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer.json with a few merges and two special tokens: 262 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<eos>", *alphabet, "th", "he", "the", "Ġt"]
    merges = [("t", "h"), ("h", "e"), ("th", "e"), ("Ġ", "t")]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<pad>", "<eos>"])
    inner.save(str(folder / "tokenizer.json"))
    return folder


def prompt(vocab: int, length: int, seed: int = 1) -> np.ndarray:
    """int64 ids [length] from the whole vocabulary: the first, the last and some repeats among them."""
    ids = np.random.default_rng(seed).integers(0, vocab, length)
    ids[1], ids[2], ids[3], ids[length // 2] = vocab - 1, 0, ids[0], vocab - 2
    return ids.astype(np.int64)


@cache
def reference(folder: Path) -> PreTrainedModel:
    """transformers' own model of a text-only folder, in float32."""
    kind, config = theirs(json.loads((folder / "config.json").read_text()))
    model = kind.from_pretrained(folder, config=config, dtype=torch.float32, local_files_only=True)
    return model.eval()


def expected(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """float32 [t, vocab]: every position in one pass, no cache."""
    with torch.inference_mode():
        out: np.ndarray = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].float().numpy()
    return out


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, in units of the largest wanted value; infinite if anything is not finite."""
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    largest = float(np.abs(wanted).max())
    assert largest > 1.0, "the reference says nothing"
    worst = float(np.abs(found.astype(np.float64) - wanted).max() / largest)
    return worst if np.isfinite(found).all() else float("inf")


def assert_close(found: np.ndarray, wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """One tolerance for everybody."""
    assert distance(found, wanted) <= tolerance
