"""llama.cpp in a process of its own, measured from inside: ``PYTHON peer_child.py version|check FILE|measure JSON``.

Runs as a script in any Python that has llama_cpp, of which there may be none in edge's: imports nothing but the
standard library and, once it is asked for, that. It speaks as edge/profile/child.py does, a JSON object a line. The
low-level calls are used: ids in, logits out.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from time import monotonic, perf_counter
from typing import Any

# Tokens of a prompt that engines are given at once where it is longer.
AT_ONCE = 512
PR_SET_PDEATHSIG, SIGKILL = 1, 9
VOLUNTEER = 800


class Refused(Exception):
    """llama.cpp does not do it, in its own words."""


class Llama:
    """A model and a context. As llama.cpp comes: the file mapped, weights repacked for this machine where it can.

    ``context`` 0: only what the file says of itself, no tensor.
    """

    def __init__(self, file: str, context: int, threads: int = 1) -> None:
        import llama_cpp

        self.api, said = llama_cpp, list[str]()
        self.quiet = llama_cpp.llama_log_callback(
            lambda _level, text, _data: said.append(text.decode("utf-8", "replace"))
        )
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.vocab_only = not context
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), settings)
        if not self.model:
            raise Refused(f"llama.cpp does not load {file}: {reason(said)}")
        if not context:
            return
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = context, AT_ONCE, AT_ONCE
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.swa_full = False  # else sliding layers keep the whole context
        self.context = llama_cpp.llama_init_from_model(self.model, wanted)
        if not self.context:
            raise Refused(f"llama.cpp has no context for {file}: {reason(said)}")

    def feed(self, ids: Sequence[int]) -> None:
        tokens = (self.api.llama_token * len(ids))(*ids)
        status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise Refused(f"llama_decode: {status}")
        self.api.llama_get_logits_ith(self.context, -1)

    def reset(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)

    def extensions(self) -> str:
        """Of the processor, those that it was built for."""
        parts = self.api.llama_print_system_info().decode().split("|")
        return " ".join(part.strip() for part in parts if "= 1" in part)


def reason(said: Sequence[str]) -> str:
    """Of what llama.cpp told: the last complaint that names what is wrong, not what followed of it."""
    lines = [line.strip() for line in "".join(said).splitlines() if line.strip()]
    named = [line for line in lines if "error loading" in line or "unknown" in line]
    return (named or lines or ["no message"])[-1]


def version() -> str:
    """Of the package, whose numbers are not llama.cpp's own."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    import llama_cpp

    try:
        return f"llama-cpp-python {installed('llama-cpp-python')}"
    except PackageNotFoundError:
        return f"llama-cpp-python {llama_cpp.__version__}"


def measure(asked: dict[str, Any], say: Callable[..., None], engine: Callable[..., Any] = Llama) -> dict[str, Any]:
    """The tests of edge/profile/child.py, each on an empty cache: the first prompt, decoding, a prompt once everything
    is warm and, going on from there, one as long as ``depth`` and decoding after it. Seconds.
    """
    say(at=monotonic(), mark="started")
    start = perf_counter()
    llama = engine(asked["file"], asked["context"], asked["threads"])
    found: dict[str, Any] = {"load_s": perf_counter() - start}
    say(at=monotonic(), mark="loaded")
    prompt, new, depth = asked["prompt"], asked["new"], asked["depth"]
    found["load_bytes"] = storage_bytes()
    ids = random.Random(0).choices(range(min(4, llama.vocab - 1), llama.vocab), k=max(prompt, depth) + new + 1)
    found["first_s"] = feed_all(llama, ids[:prompt])[-1][1]
    say(at=monotonic(), mark="first prompt")

    llama.reset()
    llama.feed(ids[:1])
    found["decode"] = {"seconds": decode(llama, ids[-new:])}
    say(at=monotonic(), mark=f"tg{new}")
    if not asked["short"]:
        llama.reset()
        found["first_token"] = reached = feed_all(llama, ids[:prompt])
        found["prompt_s"] = reached[-1][1]
        say(at=monotonic(), mark=f"pp{prompt}")
        if depth:
            reached += [(prompt + n, found["prompt_s"] + s) for n, s in feed_all(llama, ids[prompt:depth])]
            found["depth_s"] = reached[-1][1]
            say(at=monotonic(), mark=f"pp{depth}")
            found["deep"] = {"seconds": decode(llama, ids[-new:])}
            say(at=monotonic(), mark=f"tg{new} @ d{depth}")
    return {**found, "version": version(), "extensions": llama.extensions(), "memory": memory()}


def decode(engine: Any, ids: Sequence[int]) -> list[float]:
    """Seconds of each token, one by one."""
    return [feed_all(engine, [i])[0][1] for i in ids]


def feed_all(engine: Any, ids: Sequence[int]) -> list[tuple[int, float]]:
    """In pieces that every engine takes; how many tokens were done after how many seconds."""
    start, reached = perf_counter(), list[tuple[int, float]]()
    for at in range(0, len(ids), AT_ONCE):
        piece = ids[at : at + AT_ONCE]
        engine.feed(piece)
        reached.append((at + len(piece), perf_counter() - start))
    return reached


def storage_bytes() -> int | None:
    """Bytes that this process has had read from storage; None where the kernel does not count them."""
    try:
        with open("/proc/self/io", encoding="utf-8") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("read_bytes:")), None)
    except OSError:
        return None


def memory() -> dict[str, int]:
    """Bytes of this process: the most that it held, and what it holds now, its own and of files."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            parts = [line.partition(":") for line in file]
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    fields = {name: int(rest.split()[0]) << 10 for name, _, rest in parts if "kB" in rest}
    return {
        "peak_bytes": fields["VmHWM"],
        "anonymous_bytes": fields["RssAnon"],
        "file_bytes": fields["RssFile"] + fields["RssShmem"],
    }


def volunteer() -> None:
    """Ends with the process that started it, and goes first when memory runs out: as edge's own children do."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write(str(VOLUNTEER))
    except OSError:
        return


def tell(**line: Any) -> None:
    """A line on stdout."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Does what the command line asks for."""
    # The folder of this file, whose modules are none of the peer's.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    volunteer()
    code = 1
    try:
        if sys.argv[1] == "version":
            tell(result={"version": version()})
        elif sys.argv[1] == "check":
            Llama(sys.argv[2], 0)
            tell(result={"loads": True})
        else:
            tell(result=measure(json.loads(sys.argv[2]), tell))
        code = 0
    except (Refused, ImportError) as error:
        tell(error={"kind": type(error).__name__, "text": str(error)})
    # Without the farewell of libraries, which can take a while and fail.
    os._exit(code)


if __name__ == "__main__":
    main()
