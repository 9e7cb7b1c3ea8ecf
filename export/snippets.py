"""Programs for the README of a package, for the very inputs and outputs that it has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from loaders.formats.contract import EMBEDS, KEEP, CacheSpec
from loaders.formats.package import Facts

# Tokens that a window's buffer has beyond the window.
SLACK = 16
INDENT = " " * 12
NUMPY = {"float32": "np.float32", "float16": "np.float16"}


def capacity(cache: CacheSpec, context: int) -> int:
    """Tokens that the buffer of a cache has; of one that grows, none at first."""
    if cache.kind == "growing":
        return 0
    return min(context, cache.span + SLACK) if cache.kind == "window" and cache.span is not None else context


def kept(cache: CacheSpec, context: int) -> int:
    """Tokens that a cache keeps at most, whoever's buffer it is in."""
    if cache.kind == "growing":
        return context if cache.span is None else min(context, cache.span - 1)
    return capacity(cache, context)


def vocab_of(facts: Facts) -> int | str:
    """How many logits there are."""
    logits = facts.contract.output("logits")
    assert logits is not None
    return logits.shape[-1]


def asked(facts: Facts) -> bool:
    """Whether the graph must be told how many last tokens' logits are wanted."""
    keep = facts.contract.input(KEEP)
    return keep is not None and not keep.optional


def apart(facts: Facts) -> bool:
    """Whether the decoder is given embeddings that another graph looks up."""
    return facts.contract.input(EMBEDS) is not None


def shapes_of(facts: Facts) -> list[tuple[int, int, int]]:
    """(heads, tokens, values) of each cache's buffers."""
    return [(cache.heads, capacity(cache, facts.context), cache.dim) for cache in facts.contract.caches]


def runs(facts: Facts, opening: str, one: str, joined: str) -> str:
    """Shapes of buffers in some language, equal ones in a row as a count."""
    found = [(shape, len(list(run))) for shape, run in groupby(shapes_of(facts))]
    return opening + joined.join(one.format(*shape, count=count) for shape, count in found)


def python(facts: Facts, prompt: Sequence[int], stops: Sequence[int]) -> str:
    """A greedy loop with numpy and onnxruntime."""
    caches = facts.contract.caches
    growing = any(cache.kind == "growing" for cache in caches)
    lines = [
        "import numpy as np",
        "import onnxruntime as ort",
        "",
        "options = ort.SessionOptions()",
        "options.enable_cpu_mem_arena = options.enable_mem_pattern = False",
        f'decoder = ort.InferenceSession("{facts.graph}", options, providers=["CPUExecutionProvider"])',
    ]
    if facts.ple is not None:
        file = facts.graph.replace("decoder_model_merged", "embed_tokens") if apart(facts) else "embedding.onnx"
        lines.append(f'embedding = ort.InferenceSession("{file}", providers=["CPUExecutionProvider"])')
    lines += [python_growing(facts) if growing else python_in_place(facts)]
    lines += [
        f"tokens = {list(prompt)}  # ids to begin with",
        "logits = step(tokens, 0)",
        "for _ in range(20):",
        "    tokens.append(int(logits.argmax()))",
        f"    if tokens[-1] in {set(stops)}:" if stops else "    if False:  # the model names no token to stop at",
        "        break",
        "    logits = step(tokens[-1:], len(tokens) - 1)",
        "print(tokens)",
    ]
    return "\n".join(lines)


PYTHON_INPUTS = """
    ids = np.array([ids], np.int64)
    total = past + ids.shape[1]
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(past, total, dtype=np.int64)[None],
    }
"""
PYTHON_ROWS = '    inputs["per_layer_inputs"] = embedding.run(None, {"input_ids": ids})[0]\n'
PYTHON_APART = """\
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"], inputs["per_layer_inputs"] = embedding.run(None, {"input_ids": ids})
"""
PYTHON_KEEP = f'    inputs["{KEEP}"] = np.array(1, np.int64)\n'


def python_inputs(facts: Facts) -> str:
    """All inputs but the caches."""
    rows = PYTHON_APART if apart(facts) else PYTHON_ROWS * (facts.ple is not None)
    return PYTHON_INPUTS + rows + PYTHON_KEEP * asked(facts)


def python_in_place(facts: Facts) -> str:
    """Caches that are buffers, bound once."""
    caches = facts.contract.caches
    latent = all(cache.kind == "latent" for cache in caches)
    dtype = NUMPY[caches[0].dtype]
    shapes = runs(facts, "", "[({}, {}, {})] * {count}", " + ").replace("] * 1 ", "] ").removesuffix(" * 1")
    buffer = f"ort.OrtValue.ortvalue_from_numpy(np.zeros((1, *shape), {dtype}))"
    vocab = vocab_of(facts)
    body = [
        "",
        "# Heads, tokens and values of each cache; past and present are the same buffer.",
        f"caches = {shapes}",
        "binding = decoder.io_binding()",
        "for i, shape in enumerate(caches):",
        *([f"    buffer = {buffer}"] if latent else []),
        '    for part in ("key", "value"):',
        *([] if latent else [f"        buffer = {buffer}"]),
        '        binding.bind_ortvalue_input(f"past_key_values.{i}.{part}", buffer)',
        '        binding.bind_ortvalue_output(f"present.{i}.{part}", buffer)',
        f"out = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, {vocab}), np.float32))",
        'binding.bind_ortvalue_output("logits", out)',
        "",
        "",
        "def step(ids, past):",
        '    """Logits after ids; the caches hold `past` tokens already."""',
    ]
    end = (
        "    for name, value in inputs.items():\n"
        "        binding.bind_cpu_input(name, value)\n"
        "    decoder.run_with_iobinding(binding)\n"
        "    return out.numpy()[0, -1]\n\n"
    )
    return "\n".join(body) + python_inputs(facts) + end


def python_growing(facts: Facts) -> str:
    """Caches that come out longer than they went in."""
    body = ["", "caches = {"]
    for cache in facts.contract.caches:
        for name in cache.inputs:
            spec = facts.contract.input(name)
            assert spec is not None
            sizes = [1, *(0 if isinstance(d, str) else d for d in spec.shape[1:])]
            body.append(f'    "{name}": np.zeros({tuple(sizes)}, {NUMPY[spec.dtype]}),')
    pairs = [pair for cache in facts.contract.caches for pair in zip(cache.inputs, cache.outputs, strict=True)]
    body += ["}", "present = {"]
    body += [f'    "{past}": "{present}",' for past, present in pairs]
    body += ["}", "", "", "def step(ids, past):", '    """Logits after ids; the caches hold `past` tokens already."""']
    end = (
        '    logits, *found = decoder.run(["logits", *present.values()], inputs | caches)\n'
        "    caches.update(zip(present, found))\n"
        "    return logits[0, -1]\n\n"
    )
    return "\n".join(body) + python_inputs(facts) + end


def kotlin(facts: Facts) -> str:
    """One step on Android; the loop around it is that of the Python program."""
    caches = facts.contract.caches
    half = caches[0].dtype == "float16"
    kind, size = ("FLOAT16", 2) if half else ("FLOAT", 4)
    latent = all(cache.kind == "latent" for cache in caches)
    line = "repeat({count}) {{ shapes.add(longArrayOf(1, {}, {}, {})) }}"
    shapes = runs(facts, "", line, f"\n{INDENT[4:]}")
    keep = f'\n        inputs["{KEEP}"] = OnnxTensor.createTensor(env, 1L)' if asked(facts) else ""
    one, shared = ("shared", f"val shared = buffer(shape)\n{INDENT}") if latent else ("buffer(shape)", "")
    rows = ple = ""
    if facts.ple is not None:
        ple = '\n    private val embedding = env.createSession(File(folder, "embedding.onnx").path)'
        rows = (
            '\n        val rows = embedding.run(mapOf("input_ids" to inputs.getValue("input_ids")))\n'
            '        inputs["per_layer_inputs"] = rows.get(0) as OnnxTensor'
        )
    return f"""
// implementation("com.microsoft.onnxruntime:onnxruntime-android:{facts.min_ort}.0") or newer
import ai.onnxruntime.*
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.LongBuffer

class Decoder(folder: File) {{
    private val env = OrtEnvironment.getEnvironment()
    private val options = OrtSession.SessionOptions().apply {{
        setCPUArenaAllocator(false)
        setMemoryPatternOptimization(false)
    }}
    private val decoder = env.createSession(File(folder, "{facts.graph}").path, options){ple}
    private val past = HashMap<String, OnnxTensor>()
    private val present = HashMap<String, OnnxValue>()

    init {{
        val shapes = ArrayList<LongArray>()
        {shapes}
        for ((i, shape) in shapes.withIndex()) {{
            {shared}for (part in listOf("key", "value")) {{
                val tensor = {one} // written in place: past and present at once
                past["past_key_values.$i.$part"] = tensor
                present["present.$i.$part"] = tensor
            }}
        }}
    }}

    private fun buffer(shape: LongArray): OnnxTensor {{
        val bytes = ByteBuffer.allocateDirect((shape.reduce(Long::times) * {size}).toInt())
        return OnnxTensor.createTensor(env, bytes.order(ByteOrder.nativeOrder()), shape, OnnxJavaType.{kind})
    }}

    private fun row(ids: LongArray) =
        OnnxTensor.createTensor(env, LongBuffer.wrap(ids), longArrayOf(1, ids.size.toLong()))

    /** Logits after [ids]; the caches hold [length] tokens already. */
    fun step(ids: LongArray, length: Int): FloatArray {{
        val inputs = HashMap<String, OnnxTensor>()
        inputs["input_ids"] = row(ids)
        inputs["attention_mask"] = row(LongArray(length + ids.size) {{ 1L }})
        inputs["position_ids"] = row(LongArray(ids.size) {{ (length + it).toLong() }}){keep}{rows}
        decoder.run(inputs + past, setOf("logits"), present).use {{ found ->
            val logits = (found.get("logits").get() as OnnxTensor).floatBuffer
            inputs.values.forEach {{ it.close() }}
            return FloatArray(logits.remaining()).also {{ logits.get(it) }}
        }}
    }}
}}
"""


def swift(facts: Facts) -> str:
    """One step on Apple's systems."""
    latent = all(cache.kind == "latent" for cache in facts.contract.caches)
    vocab = vocab_of(facts)
    line = "Array(repeating: [1, {}, {}, {}], count: {count})"
    shapes = runs(facts, f"\n{INDENT}", line, f"\n{INDENT}+ ")
    keep = f'\n        inputs["{KEEP}"] = try row([1], shape: [])' if asked(facts) else ""
    one, shared = ("shared", f"let shared = try tensor(shape)\n{INDENT}") if latent else ("try tensor(shape)", "")
    rows = ple = opened = ""
    if facts.ple is not None:
        ple = "\n    private let embedding: ORTSession"
        opened = (
            '\n        embedding = try ORTSession(env: env, modelPath: folder + "/embedding.onnx", sessionOptions: nil)'
        )
        rows = (
            '\n        inputs["per_layer_inputs"] = try embedding.run(\n'
            '            withInputs: ["input_ids": inputs["input_ids"]!], outputNames: ["per_layer_inputs"],\n'
            '            runOptions: nil)["per_layer_inputs"]'
        )
    return f"""
// pod "onnxruntime-objc", ">= {facts.min_ort}"
import Foundation
import onnxruntime_objc

final class Decoder {{
    private let env = try! ORTEnv(loggingLevel: .warning)
    private let decoder: ORTSession{ple}
    private var past: [String: ORTValue] = [:]
    private var present: [String: ORTValue] = [:]
    private let logits = NSMutableData(length: {vocab} * 4)!

    init(folder: String) throws {{
        decoder = try ORTSession(env: env, modelPath: folder + "/{facts.graph}", sessionOptions: nil){opened}
        let shapes: [[Int]] ={shapes}
        for (i, shape) in shapes.enumerated() {{
            {shared}for part in ["key", "value"] {{
                let buffer = {one}  // written in place: past and present at once
                past["past_key_values.\\(i).\\(part)"] = buffer
                present["present.\\(i).\\(part)"] = buffer
            }}
        }}
        present["logits"] = try ORTValue(tensorData: logits, elementType: .float, shape: [1, 1, {vocab}])
    }}

    private func tensor(_ shape: [Int]) throws -> ORTValue {{
        let bytes = NSMutableData(length: shape.reduce(4, *))!
        return try ORTValue(tensorData: bytes, elementType: .float, shape: shape.map {{ NSNumber(value: $0) }})
    }}

    private func row(_ ids: [Int64], shape: [NSNumber]? = nil) throws -> ORTValue {{
        let bytes = ids.withUnsafeBytes {{ NSMutableData(bytes: $0.baseAddress, length: $0.count) }}
        let row = [1, NSNumber(value: ids.count)]
        return try ORTValue(tensorData: bytes, elementType: .int64, shape: shape ?? row)
    }}

    /// Logits after `ids`; the caches hold `length` tokens already.
    func step(_ ids: [Int64], length: Int) throws -> [Float] {{
        var inputs = past
        inputs["input_ids"] = try row(ids)
        inputs["attention_mask"] = try row([Int64](repeating: 1, count: length + ids.count))
        inputs["position_ids"] = try row((length..<length + ids.count).map(Int64.init)){keep}{rows}
        try decoder.run(withInputs: inputs, outputs: present, runOptions: nil)
        return Array(UnsafeBufferPointer(start: logits.bytes.assumingMemoryBound(to: Float.self), count: {vocab}))
    }}
}}
"""
