"""Matrices as ONNX Runtime packs them for this CPU, kept in a file: mapped, they are clean pages that the system may
take back, where a session would hold them in memory of its own.

Baked in a process of its own by ``python -m edge.engine.ort_bake GRAPH FOLDER``, on the first run of a package whose
budget has room for it, into the user's cache. Another CPU or version of the library packs differently: its folder has
another name, and what is stale is swept when something is baked. The library packs at every start all the same, one
matrix at a time, and takes from the file what it finds there equal.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnxruntime as ort

from edge.budget.memory import available_memory
from edge.budget.price_ort import OrtPrices
from edge.engine.ort_start import ERRORS, PROVIDERS, options
from edge.processes import module_command, module_environment
from edge.store.cache import cache_root, in_memory, make_folder
from edge.store.packs import key_of, locked, refuse_foreign
from loaders.errors import EdgeError
from loaders.formats import manifest as manifests
from loaders.formats.atomic import fresh_folder
from loaders.formats.onnx_file import GRAPH as GRAPH_PROTO
from loaders.formats.onnx_file import MODEL, PAIR, TENSOR
from loaders.formats.package import Package
from loaders.formats.protobuf import Message, Span, Wire
from loaders.formats.sharded import Notify

GRAPH, DATA = "model.onnx", "weights.bin"
KIND = manifests.Kind("edge baked weights", 1, "cache", "Remove it", "Remove it", own=True)
# Below this many packed bytes a file is not worth its while.
LEAST = 32 << 20
# What a process that bakes takes beside the weights, and smaller initializers stay in the graph.
PROCESS, INLINE = 96 << 20, 1024
FACTS = ("of", "ort", "cpu")


def cpu() -> str:
    """What stands for this CPU: its architecture and, where the system tells, its model and its instructions."""
    text = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0].splitlines()
        text += "".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def facts_of(package: Package) -> dict[str, str]:
    """What baked weights depend on."""
    return {"of": package.seal, "ort": ort.__version__, "cpu": cpu(), "package": os.path.abspath(package.folder)}


def home() -> Path:
    """Where baked weights lie."""
    return cache_root() / "baked"


def folder_of(package: Package) -> Path:
    """Where those of a package lie, or would."""
    facts = facts_of(package)
    mark = hashlib.sha256(json.dumps([facts[name] for name in FACTS]).encode()).hexdigest()
    return home() / key_of(package, mark)


def ready(package: Package) -> Path | None:
    """The baked graph of a package; None where there is none that can be trusted."""
    folder = folder_of(package)
    try:
        refuse_foreign(folder)
        manifest = manifests.opened(folder, KIND)
        data = os.stat(folder / DATA)
        manifests.verify(folder, manifest, 32 << 20, KIND)
    except (EdgeError, OSError):
        return None
    facts = facts_of(package)
    same = all(manifest.get(name) == facts[name] for name in FACTS) and manifest.get("written") == data.st_mtime_ns
    return folder / GRAPH if same else None


def baked(package: Package, prices: OrtPrices, planned: int, room: int | None, notify: Notify) -> Path | None:
    """The baked graph of a package, made now where that is worth it and ``room`` bytes of memory and the disk allow it.

    None otherwise, where it does not come off, and where opening it would take more than the ``planned`` bytes that are
    left to this run: nothing depends on it.
    """
    spare = available_memory()[0] if room is None else room
    if prices.packed_bytes < LEAST or prices.baked_bytes > min(spare, planned):
        return None
    found = ready(package)
    if found is not None or PROCESS + prices.baking_bytes > spare:
        return found
    folder, size = folder_of(package), prices.packed_bytes + sum(weight.length for weight in package.weights_facts)
    try:
        make_folder(folder.parent)
        if in_memory(folder.parent):
            return None
        with locked(folder, notify):
            if ready(package) is None:
                sweep(folder)
                shutil.rmtree(folder, ignore_errors=True)
                bake(package, folder, size, notify)
    except (EdgeError, OSError, subprocess.SubprocessError):
        return None
    return ready(package)


def bake(package: Package, folder: Path, size: int, notify: Notify) -> None:
    """Writes the folder, whole or not at all."""
    with fresh_folder(folder, size + size // 20) as place:
        notify("baking", 0, 1)
        line, none = (
            module_command("edge.engine.ort_bake", str(package.graph.absolute()), str(place)),
            subprocess.DEVNULL,
        )
        subprocess.run(line, check=True, stdin=none, stdout=none, stderr=none, env=module_environment())
        files = {}
        for name in (GRAPH, DATA):
            files[name] = {"bytes": (place / name).stat().st_size, "sha256": manifests.digest(place / name)}
        written = os.stat(place / DATA).st_mtime_ns
        facts: dict[str, Any] = {"format": KIND.format, "version": KIND.version, **facts_of(package)}
        (place / manifests.NAME).write_bytes(manifests.sealed({**facts, "written": written, "files": files}))
        notify("baking", 1, 1)


def sweep(keep: Path) -> None:
    """Removes what was baked of packages that are gone or changed, or for another library or CPU."""
    for folder in home().iterdir():
        if folder.name.startswith(".") or folder == keep or not folder.is_dir():
            continue
        if stale(folder):
            shutil.rmtree(folder, ignore_errors=True)


def stale(folder: Path) -> bool:
    """Whether nothing will ask for a folder again."""
    try:
        manifest = manifests.opened(folder, KIND)
        package = Path(str(manifest["package"]))
        seal = manifests.opened(package, manifests.Kind("edge package", 1, "", "", "", ("onnx",))).get("seal")
    except (EdgeError, KeyError):
        return True
    return (manifest.get("of"), manifest.get("ort"), manifest.get("cpu")) != (seal, ort.__version__, cpu())


def places(graph: Path) -> dict[str, tuple[int, int]]:
    """(offset, bytes) in the file of weights, by name, as a baked graph has them."""
    wire, found = Wire(graph.read_bytes(), str(graph)), dict[str, tuple[int, int]]()
    for span in parts(wire, (0, len(wire.data)), MODEL, 7):
        for tensor in parts(wire, span, GRAPH_PROTO, 5):
            name, entries = "", dict[str, str]()
            for number, a, b in wire.fields(tensor, TENSOR):
                if number == 8:
                    name = wire.text(a, b, TENSOR.name)
                elif number == 13:
                    pair = {n: wire.text(c, d, PAIR.name) for n, c, d in wire.fields((a, b), PAIR)}
                    entries[pair.get(1, "")] = pair.get(2, "")
            if {"offset", "length"} <= entries.keys():
                found[name] = int(entries["offset"]), int(entries["length"])
    return found


def parts(wire: Wire, span: Span, kind: Message, wanted: int) -> Iterator[Span]:
    """The spans of a message's fields of one number."""
    return ((a, b) for number, a, b in wire.fields(span, kind) if number == wanted)


def main(graph: str, folder: str) -> int:
    """Optimizes a graph and writes it down with all of its weights, packed ones beside those they were made of."""
    chosen = options()
    chosen.optimized_model_filepath = os.path.join(folder, GRAPH)
    for key, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", DATA),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(INLINE)),
    ):
        chosen.add_session_config_entry(key, value)
    try:
        ort.InferenceSession(graph, chosen, providers=PROVIDERS)
    except ERRORS as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
