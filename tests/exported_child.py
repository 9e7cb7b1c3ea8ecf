"""Runs an exported package by what its manifest says, with numpy and ONNX Runtime alone: no line of edge is imported.

python exported_child.py PACKAGE IDS.npy OUT.npz [LEVEL]

LEVEL is the accuracy level of products that are made of dequantized blocks. OUT has "every" [t, vocab], all logits in
one pass (of graphs that give one at a time: the last), and "pieces", "pieces_at": the last logits of passes of uneven
sizes and then of single tokens, and where they are.
"""

import json
import os
import sys

import numpy as np
import onnxruntime as ort

DTYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64}
SLACK = 16
PIECES = (1, 17, 1, 5)


class Runner:
    """A package with its caches."""

    def __init__(self, folder, level=None):
        with open(os.path.join(folder, "manifest.json")) as file:
            self.manifest = json.load(file)
        self.session = self.opened(os.path.join(folder, self.manifest["graph"]), level)
        self.rows = None
        if "per_layer_inputs" in self.manifest["inputs"]:
            self.rows = self.opened(os.path.join(folder, "embedding.onnx"), None)
        self.reset()

    def opened(self, path, level):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        if level is not None:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def reset(self):
        """Empty caches."""
        self.position, self.buffers = 0, {}
        for cache in self.manifest["caches"]:
            sizes = dict.fromkeys(cache["inputs"], cache["dim"])
            if cache["kind"] == "growing":
                tokens = 0
            elif cache["kind"] == "window":
                tokens = min(self.manifest["context"], cache["span"] + SLACK)
            else:
                tokens = self.manifest["context"]
            shared = None
            for name in cache["inputs"]:
                size = self.manifest["inputs"][name]["shape"][-1]
                sizes[name] = cache["dim"] if isinstance(size, str) else size
                if shared is None or cache["kind"] != "latent":
                    shared = np.zeros((1, cache["heads"], tokens, sizes[name]), DTYPES[cache["dtype"]])
                self.buffers[name] = ort.OrtValue.ortvalue_from_numpy(shared) if tokens == 0 else shared

    def step(self, ids, keep):
        """Appends ids [t]; logits [keep, vocab]."""
        total = self.position + len(ids)
        given = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.position, total, dtype=np.int64)[None],
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        if self.rows is not None:
            given["per_layer_inputs"] = self.rows.run(None, {"input_ids": ids[None]})[0]
        io, grown = self.session.io_binding(), []
        for name, array in given.items():
            if name in self.manifest["inputs"]:
                io.bind_cpu_input(name, array)
        for cache in self.manifest["caches"]:
            for past, present in zip(cache["inputs"], cache["outputs"], strict=True):
                buffer = self.buffers[past]
                if cache["kind"] == "growing":
                    io.bind_ortvalue_input(past, buffer)
                    io.bind_output(present, "cpu")
                    grown.append(past)
                else:
                    place = ("cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
                    io.bind_input(past, *place)
                    io.bind_output(present, *place)
        io.bind_output("logits", "cpu")
        self.session.run_with_iobinding(io)
        outputs = io.get_outputs()
        self.buffers.update(zip(grown, outputs[-1 - len(grown) : -1], strict=True))
        self.position = total
        return outputs[-1].numpy()[0].copy()


def main(folder, ids, out, level=None):
    """Both ways of feeding, in one process."""
    ids = np.load(ids)
    runner = Runner(folder, level)
    every = runner.step(ids, len(ids))
    runner.reset()
    pieces, at = [], []
    sizes = [*PIECES, *[1] * (len(ids) - sum(PIECES))]
    for size in sizes:
        pieces.append(runner.step(ids[runner.position : runner.position + size], 1))
        at.append(runner.position - 1)
    np.savez(out, every=every, pieces=np.concatenate(pieces), pieces_at=np.array(at))


if __name__ == "__main__":
    main(*sys.argv[1:])
