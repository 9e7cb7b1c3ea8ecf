"""llama.cpp in a process of its own, by the low-level calls of llama-cpp-python: ids in, logits out.

Started by benchmarks/peers.py in the environment of benchmarks/peers-constraints.txt.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.metadata import version
from time import perf_counter

import llama_cpp

from benchmarks.peers_measure import AT_ONCE, Asked, asked, measure, report


class Llama:
    """A model and a context. As llama.cpp comes: the file mapped, weights repacked for this machine where it can."""

    def __init__(self, what: Asked) -> None:
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(what.file.encode(), model)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {what.file}: {said[-1].strip() if said else 'no message'}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = what.context, AT_ONCE, AT_ONCE
        context.n_threads = context.n_threads_batch = what.threads
        context.swa_full = False  # else sliding layers keep the whole context
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise SystemExit(f"llama.cpp has no context for {what.file}: {said[-1].strip() if said else 'no message'}")

    def feed(self, ids: Sequence[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise SystemExit(f"llama_decode: {status}")
        llama_cpp.llama_get_logits_ith(self.context, -1)

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)


# What llama.cpp has to say: kept for an error, and told to nobody else.
said: list[str] = []


@llama_cpp.llama_log_callback
def quiet(_level: int, text: bytes, _data: object) -> None:
    """Keeps a line."""
    said.append(text.decode("utf-8", "replace"))


def main() -> None:
    """Measures what the command line asks for."""
    what, start = asked(), perf_counter()
    engine = Llama(what)
    facts = {"load_s": perf_counter() - start, "version": f"llama-cpp-python {version('llama-cpp-python')}"}
    info = llama_cpp.llama_print_system_info().decode().split("|")
    report({**facts, "plan": " ".join(part.strip() for part in info if "= 1" in part), **measure(engine, what)})


if __name__ == "__main__":
    main()
