"""Brings ONNX Runtime up and runs a toy graph through it once, so that what the library takes is measured, not guessed.

The toy is written down here as protobuf: the onnx package would cost tens of megabytes in every run.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from edge.budget.memory import trim
from edge.engine.threads import thread_count
from loaders.errors import BadCheckpoint, EdgeError, OverBudget, Unsupported, Usage

PROVIDERS = ["CPUExecutionProvider"]
ERRORS = tuple(
    getattr(state, name)
    for name in (
        "Fail", "InvalidArgument", "NoSuchFile", "NoModel", "EngineError", "RuntimeException", "InvalidProtobuf",
        "NotImplemented", "InvalidGraph", "EPFail",
    )
    if hasattr(state, name)
)  # fmt: skip
# What goes wrong is said once, by the error that is raised.
NOTHING = 4
M_MMAP_THRESHOLD, MAPPED = -3, 128 << 10
FLOAT, UINT8, INT32, INT64 = 1, 2, 6, 7


def pick_device(name: str) -> str:
    """'auto' is the CPU. Raises Usage or Unsupported for others."""
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise Usage(name, field="--device", expected="auto, cpu, cuda or mps")
    if name not in ("auto", "cpu"):
        raise Unsupported(f"exported packages on {name}", field="--device", expected="cpu")
    return "cpu"


def version() -> str:
    """Of the library that is installed."""
    return metadata.version("onnxruntime")


def numbers(text: str) -> tuple[int, ...]:
    """'1.29' as what sorts."""
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def require(least: str, file: Path) -> None:
    """Raises Unsupported where the library is older than a package needs."""
    if numbers(ort.__version__) < numbers(least):
        raise Unsupported(f"ONNX Runtime {ort.__version__}", file=file, field="min_ort", expected=f"{least} or later")


def options(count: int | None = None) -> ort.SessionOptions:
    """No arena and no pattern, both of which keep free memory; threads that sleep when there is nothing to do."""
    found = ort.SessionOptions()
    found.enable_cpu_mem_arena = found.enable_mem_pattern = False
    found.intra_op_num_threads, found.inter_op_num_threads = count or thread_count(), 1
    found.log_severity_level = NOTHING
    found.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return found


def started(graph: Path, file: Path, chosen: ort.SessionOptions) -> ort.InferenceSession:
    """A session of ``graph``; errors name ``file``. Raises BadCheckpoint, Unsupported, OverBudget."""
    try:
        return ort.InferenceSession(str(graph), chosen, providers=PROVIDERS)
    except (*ERRORS, MemoryError) as error:
        raise refused(error, file) from None


def refused(error: Exception, file: Path | None) -> EdgeError:
    """An error of the library, as edge says it: memory, a mechanism this version lacks, or a graph that cannot run."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", lines[0] if lines else type(error).__name__)
    text = re.sub(r"^Error in execution: |Non-zero status code .*Status Message: ", "", text)
    if "Failed to allocate" in text or "bad_alloc" in text or isinstance(error, MemoryError):
        return OverBudget(text, field="memory", hint="Raise --budget or lower --context")
    kind = Unsupported if isinstance(error, state.NotImplemented) else BadCheckpoint
    return kind(text, file=file)


# The toy


def varint(value: int) -> bytes:
    """A number as protobuf has it."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def field(number: int, value: int | bytes | str) -> bytes:
    """A field of a message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attrs: int) -> bytes:
    """NodeProto, as a node of a GraphProto."""
    body = b"".join(field(1, name) for name in inputs) + b"".join(field(2, name) for name in outputs)
    body += field(4, op) + field(7, domain)
    for name, value in attrs.items():
        body += field(5, field(1, name) + field(3, value) + field(20, 2))
    return field(1, body)


def tensor(name: str, dtype: int, value: np.ndarray) -> bytes:
    """TensorProto, as an initializer of a GraphProto."""
    sizes = b"".join(field(1, size) for size in value.shape)
    return field(5, sizes + field(2, dtype) + field(8, name) + field(9, value.tobytes()))


def declared(number: int, name: str, dtype: int, shape: Sequence[int | str]) -> bytes:
    """ValueInfoProto, as an input (11) or an output (12) of a GraphProto."""
    sizes = b"".join(field(1, field(1 if isinstance(size, int) else 2, size)) for size in shape)
    return field(number, field(1, name) + field(2, field(1, field(1, dtype) + field(2, sizes))))


def toy() -> bytes:
    """A layer in little: quantized rows, norm, products in int4, int8 and float32, attention over a buffer."""
    ms, d = "com.microsoft", 64
    blocks = {"block_size": 32, "K": d, "N": d, "accuracy_level": 4}
    scales = np.full((d, d // 32), 0.01, np.float32)
    graph = b"".join((
        node("GatherBlockQuantized", ("rows", "ids", "scales"), ("x",), ms, bits=8, block_size=32, quantize_axis=1),
        node("SimplifiedLayerNormalization", ("x", "ones"), ("n",)),
        node("MatMulNBits", ("n", "four", "scales"), ("q",), ms, bits=4, **blocks),
        node("MatMulNBits", ("n", "eight", "scales"), ("k",), ms, bits=8, **blocks),
        node("GroupQueryAttention", ("q", "k", "k", "past", "past.v", "less", "most"), ("a", "new", "new.v"), ms,
             num_heads=2, kv_num_heads=2),
        node("MatMul", ("a", "plain"), ("m",)),
        node("Gelu", ("m",), ("g",), ms),
        node("Softmax", ("g",), ("y",)),
        field(2, "toy"),
        tensor("rows", UINT8, np.zeros((d, d), np.uint8)),
        tensor("four", UINT8, np.zeros((d, d // 32, 16), np.uint8)),
        tensor("eight", UINT8, np.zeros((d, d // 32, 32), np.uint8)),
        tensor("scales", FLOAT, scales),
        tensor("ones", FLOAT, np.ones(d, np.float32)),
        tensor("plain", FLOAT, np.ones((d, d), np.float32)),
        declared(11, "ids", INT64, (1, "t")),
        declared(11, "past", FLOAT, (1, 2, 32, 32)),
        declared(11, "past.v", FLOAT, (1, 2, 32, 32)),
        declared(11, "less", INT32, (1,)),
        declared(11, "most", INT32, (1,)),
        declared(12, "y", FLOAT, (1, "t", d)),
        declared(12, "new", FLOAT, (1, 2, 32, 32)),
        declared(12, "new.v", FLOAT, (1, 2, 32, 32)),
    ))  # fmt: skip
    imports = field(8, field(1, "") + field(2, 21)) + field(8, field(1, ms) + field(2, 1))
    return field(1, 10) + field(7, graph) + imports


def map_blocks() -> None:
    """Has glibc map blocks from 128 KiB on singly. The values of a pass come and go in many sizes: in one heap they
    leave holes between them, other ones in each run, and a peak that nobody can plan.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED)


def warm_up() -> None:
    """A prefill and a step of the toy, in a session like a model's."""
    map_blocks()
    ort.set_default_logger_severity(NOTHING)
    session = ort.InferenceSession(toy(), options(), providers=PROVIDERS)
    past = np.zeros((1, 2, 32, 32), np.float32)
    for at, count in ((0, 16), (16, 1)):
        total = np.array([at + count], np.int32)
        ids = np.zeros((1, count), np.int64)
        session.run(None, {"ids": ids, "past": past, "past.v": past, "less": total - 1, "most": total})
    del session
    trim()
