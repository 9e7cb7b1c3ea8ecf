"""Random checkpoints at the true shapes of a config, tensor by tensor: something to measure without downloads."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from loaders.checkpoint import file_name
from loaders.families import family_of
from loaders.formats.config import Config, read_json
from loaders.formats.safetensors_writer import Writer
from loaders.network.tensors import tensors

BAND = 1 << 24


def write_random(config: Path, folder: Path, *, device: str = "cpu", seed: int = 0) -> None:
    """A bf16 checkpoint folder of ``config``'s shapes: normal weights scaled by fan-in, norms around one."""
    raw = read_json(config)
    parsed = Config(raw, str(config))
    family = family_of(parsed.raw("model_type"), str(config))
    model = family.parse(parsed)
    folder.mkdir(parents=True)
    shapes = {name: ("model." + file_name(family, name), shape) for name, shape in tensors(model).items()}
    generator = torch.Generator(device).manual_seed(seed)
    with Writer(folder / "model.safetensors", {name: ("BF16", shape) for name, shape in shapes.values()}) as writer:
        for name, shape in shapes.values():
            writer.write(name, bands(shape, generator, device))
    (folder / "config.json").write_text(json.dumps(raw))


def bands(shape: tuple[int, ...], generator: torch.Generator, device: str) -> Iterator[bytes]:
    """Raw bfloat16 values of one tensor, a few rows at a time."""
    width = shape[1] if len(shape) > 1 else 1
    step = max(1, BAND // width)
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        values = torch.randn((rows, width), generator=generator, device=device)
        values = values * width**-0.5 if len(shape) > 1 else 1.0 + 0.1 * values
        yield values.to(torch.bfloat16).cpu().view(torch.uint16).numpy().reshape(-1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    write_random(options.config, options.folder, device=options.device)
