"""A run on disk: parameters and optimizer state to go on from, as safetensors, and the model as a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.demo_model.network import Params, whole
from benchmarks.demo_model.optimizers import Stepper
from benchmarks.demo_model.shape import CONFIG, read_config
from loaders.families.gemma3n import FAMILY
from loaders.layout import file_name

STATE = "state.safetensors"
# A file of the checkpoint: small enough for whatever carries it.
SHARD = 12_500_000


def save_state(path: Path, step: int, params: Params, optimizers: list[Stepper]) -> None:
    """Everything that the next step depends on; replaced in one move."""
    found = {f"p.{name}.{i}": b.detach() for name, blocks in params.items() for i, b in enumerate(blocks)}
    for which, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            found |= {f"o.{which}.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
    found = {name: tensor.contiguous().cpu() for name, tensor in found.items()}
    temporary = path.with_suffix(".tmp")
    save_file(found, temporary, {"step": str(step)})
    os.replace(temporary, path)


def load_state(path: Path, params: Params, optimizers: list[Stepper]) -> int:
    """Puts a saved run back; the number of steps it had done."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    found = load_file(path)
    with torch.no_grad():
        for name, blocks in params.items():
            for i, block in enumerate(blocks):
                block.copy_(found[f"p.{name}.{i}"])
    for which, optimizer in enumerate(optimizers):
        now = optimizer.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in found.items():
            kind, number, rest = name.split(".", 2)
            if kind == "o" and int(number) == which:
                index, key = rest.split(".", 1)
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**now, "state": state})
    return step


def save_checkpoint(folder: Path, params: Params, tokenizer: Path, config_path: Path = CONFIG) -> None:
    """The model as ``transformers`` and edge read it: config.json, bf16 safetensors in shards, tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "model." + file_name(FAMILY.names, name): tensor.bfloat16().contiguous().cpu()
        for name, tensor in whole(params).items()
    }
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(values):
        nbytes = values[name].nbytes
        if size + nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = values[name]
        size += nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(v.nbytes for v in values.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    write_json(folder / "model.safetensors.index.json", index)
    config = read_config(config_path)
    write_json(folder / "config.json", config)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**ends, "do_sample": True, "temperature": 0.7, "top_k": 40})
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def load_ids(path: Path) -> np.ndarray:
    """uint16 [n]."""
    return np.load(path, allow_pickle=False)
