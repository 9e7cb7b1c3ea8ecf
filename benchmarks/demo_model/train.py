"""Trains the demo model: ``python -m benchmarks.demo_model.train DATA -o RUN``.

DATA is what ``benchmarks.demo_model.prepare`` made. Stopped at any point, the same command goes on from the last state
that was saved. Every step's windows and widths depend on the seed and its number alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo_model import draw, state
from benchmarks.demo_model.network import Network, Params, initial
from benchmarks.demo_model.optimizers import optimizers, schedule, set_rate
from benchmarks.demo_model.shape import CONFIG, read_model
from loaders.network.spec import Model

BOS = 2
WARMUP = 100
MOST_GRADIENT = 1.0
LOSS_EVERY, HELDOUT_EVERY, SAVE_EVERY = 20, 500, 1000


class Text:
    """Token ids on a device, cut into windows that begin with <bos>."""

    def __init__(self, ids: np.ndarray, length: int, device: torch.device) -> None:
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.steps = torch.arange(length, device=device)

    def at(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """(ids, targets), int64 [windows, length] each."""
        first = torch.from_numpy(starts).to(self.ids.device)[:, None]
        targets = self.ids[first + self.steps].long()
        return torch.cat((torch.full_like(targets[:, :1], BOS), targets[:, :-1]), 1), targets


class Run:
    """One training run: networks with and without the skippable block, data, and where it writes."""

    def __init__(self, args: argparse.Namespace, model: Model) -> None:
        self.args, self.model = args, model
        self.device = torch.device(args.device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        networks = [Network(model, args.length, self.device, dtype, skip) for skip in (False, True)]
        self.losses: list[Callable[..., Tensor]] = [network.loss for network in networks]
        if args.compile:
            self.losses = [torch.compile(loss, fullgraph=True, dynamic=False) for loss in self.losses]
        self.params = move(initial(model, torch.Generator().manual_seed(args.seed)), self.device)
        self.blocks = [block for blocks in self.params.values() for block in blocks]
        for block in self.blocks:
            block.grad = torch.zeros_like(block)  # and there it stays: see RecordedMuon
        self.optimizers = optimizers(
            self.params, args.optimizer, lr=args.lr, rest_lr=args.rest_lr, table_lr=args.table_lr, decay=args.decay
        )
        tales, heldout = (state.load_ids(args.data / f"{name}.npy") for name in ("tales", "heldout"))
        self.tales, self.heldout = (Text(ids, args.length, self.device) for ids in (tales, heldout))
        self.paragraphs = np.flatnonzero(np.isin(tales, line_ends(args.data / "tokenizer.json"))) + 1
        self.args.out.mkdir(parents=True, exist_ok=True)
        self.log_path = args.out / "log.jsonl"

    def go(self) -> None:
        """From where it stands to the end."""
        path, done = self.args.out / state.STATE, 0
        if path.exists():
            done = state.load_state(path, self.params, self.optimizers)
        cut_log(self.log_path, done)
        start = time.perf_counter()
        recent: list[Tensor] = []
        for step in range(done, self.args.steps):
            recent.append(self.step(step))
            now = step + 1
            if now % LOSS_EVERY == 0 or now == self.args.steps:
                self.log(step=now, loss=torch.stack(recent).mean().item(), seconds=time.perf_counter() - start)
                recent.clear()
            if now % HELDOUT_EVERY == 0 and now < self.args.steps:
                self.log(step=now, heldout=self.evaluate("full"))
            if now % SAVE_EVERY == 0 or now == self.args.steps:
                state.save_state(path, now, self.params, self.optimizers)
        if not ended(self.log_path, self.args.steps):
            self.log(step=self.args.steps, final=self.final(), seconds=time.perf_counter() - start)
        tokenizer = self.args.data / "tokenizer.json"
        state.save_checkpoint(self.args.out / "model", self.params, tokenizer, self.args.config)

    def step(self, step: int) -> Tensor:
        """One update; its loss, still on the device."""
        a = self.args
        drawn = draw.draw(
            self.model, len(self.tales.ids), self.paragraphs, a.batch, a.length, a.seed, step, a.full_share
        )
        set_rate(self.optimizers, schedule(step, a.steps, min(WARMUP, max(1, a.steps // 10))))
        ids, targets = self.tales.at(drawn.starts)
        loss = self.losses[drawn.skip](
            self.params, ids, targets, torch.from_numpy(drawn.units).to(self.device), one(ids)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.blocks, MOST_GRADIENT, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
        torch._foreach_zero_([block.grad for block in self.blocks])
        return loss.detach()

    def final(self) -> dict[str, float]:
        """Held-out loss of every kind of slice, and without the table."""
        names = ["full", "half", "quarter"]
        if self.args.full_share < 1:
            names += [f"{name}+skip-first-shared" for name in names]
        return {name: self.evaluate(name) for name in (*names, "table zeroed")}

    def evaluate(self, name: str) -> float:
        """Nats per held-out token, whole batches of whole windows."""
        most = self.model.layers[0].ffn.width
        width = most // (4 if "quarter" in name else 2 if "half" in name else 1)
        count = len(self.heldout.ids) // self.args.length // self.args.batch * self.args.batch
        starts = np.arange(count) * self.args.length
        units = torch.full((self.args.batch, len(self.model.layers)), width, device=self.device)
        total = 0.0
        for batch in np.split(starts, count // self.args.batch):
            ids, targets = self.heldout.at(batch)
            table = one(ids) * (name != "table zeroed")
            # With gradients on, although nobody wants them: the compiled step is used as it is.
            total += self.losses["skip" in name](self.params, ids, targets, units, table).item()
        return total / (count // self.args.batch)

    def log(self, **facts: Any) -> None:
        """One line of the log, shown as well."""
        line = json.dumps(facts)
        print(line, flush=True)
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def move(params: Params, device: torch.device) -> Params:
    return {name: [b.detach().to(device).requires_grad_() for b in blocks] for name, blocks in params.items()}


def one(like: Tensor) -> Tensor:
    """A 1 that a compiled graph takes as an input, not as a constant."""
    return torch.ones((), device=like.device)


def line_ends(tokenizer: Path) -> np.ndarray:
    """Ids of the tokens that end a line."""
    vocab = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    return np.array([i for token, i in vocab.items() if token.endswith("Ċ")])


def cut_log(path: Path, done: int) -> None:
    """Takes out of a log what comes after the state that a run goes on from."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= done), encoding="utf-8")


def ended(path: Path, steps: int) -> bool:
    """Whether a log says how a run of so many steps ended."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return any("final" in line and json.loads(line)["step"] == steps for line in lines)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("data", type=Path)
    found.add_argument("-o", "--out", type=Path, required=True)
    found.add_argument("--config", type=Path, default=CONFIG)
    found.add_argument("--steps", type=int, default=3500)
    found.add_argument("--batch", type=int, default=32, help="sequences a step")
    found.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    found.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    found.add_argument("--lr", type=float, default=0.025, help="of the matrices")
    found.add_argument("--rest-lr", type=float, default=0.003, help="of embeddings, norms and steering")
    found.add_argument("--decay", type=float, default=0.1)
    found.add_argument(
        "--full-share", type=float, default=0.5, help="of the sequences; 1 trains no sub-models: the dense run"
    )
    found.add_argument("--table-lr", type=float, default=0.02, help="of the per-layer embeddings")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return found


def main() -> None:
    args = parser().parse_args()
    torch.set_float32_matmul_precision("high")
    Run(args, read_model(args.config)).go()


if __name__ == "__main__":
    main()
