"""Initializers as external data: which bytes each has, where they lie in the file, and how they get there.

Bytes are made band by band out of a checkpoint or a pack, so that memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import onnx
from onnx import TensorProto

from export.forms import FLOATS, FORMS, Bytes, form_bytes, interleaved, of_codes, of_values, turned_odd, types
from export.output import Output
from loaders.errors import BadCheckpoint, Usage
from loaders.formats.quant import BITS, BLOCK, Codes, Floats, Scales
from loaders.formats.recipe import Recipe
from loaders.formats.sharded import Notify
from loaders.formats.window import Window
from loaders.network.matformer import Part, Slice, parts, sliced
from loaders.ordered import THREADS, ordered
from loaders.weights import Kept, Source, code_bands, kept, matrices, value_bands

Key = tuple[int, str, tuple[str, ...]]
T = TypeVar("T")
# What a page or a mapping is aligned to anywhere, from a size on where that costs nothing.
STEP, WIDE_STEP, WIDE = 64, 64 << 10, 1 << 20
# Values of a band; of one whose columns become strips of lines, more, so that strips are longer.
BAND, TALL = 1 << 20, 1 << 21


class Band(NamedTuple):
    """Rows ``first`` to ``stop`` of a form that has ``of`` rows."""

    first: int
    stop: int
    of: int


@dataclass(frozen=True)
class Stored:
    """One initializer and how its bytes are made.

    ``dtype``: of onnx.TensorProto. ``shape``: what the graph declares. ``form``: a key of :data:`FORMS`. ``sources``:
    canonical names of tensors of the sliced model. ``band``: the rows of it that this one is, None for all. What
    agrees in dtype, form and sources is stored once, whatever the shapes and bands.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    form: str
    sources: tuple[str, ...]
    band: Band | None = None

    @property
    def key(self) -> Key:
        """What its bytes depend on."""
        return self.dtype, self.form, self.sources


@dataclass(frozen=True)
class Place:
    """``length`` bytes at byte ``offset`` of a file, by its number."""

    file: int
    offset: int
    length: int


@dataclass(frozen=True)
class Places:
    """Where every initializer lies. ``sizes``: bytes of each file, padding included."""

    weights: tuple[Stored, ...]
    places: Mapping[Key, Place]
    sizes: tuple[int, ...]

    def of(self, stored: Stored) -> Place:
        """Where one lies."""
        place, band = self.places[stored.key], stored.band
        if band is None:
            return place
        row = place.length // band.of
        return Place(place.file, place.offset + band.first * row, (band.stop - band.first) * row)

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes)

    def files(self, name: str) -> tuple[str, ...]:
        """What the files are called, the first ``name``, the others NAME_1, NAME_2 and so on."""
        return tuple(name if i == 0 else f"{name}_{i}" for i in range(len(self.sizes)))


def layout(weights: Sequence[Stored], source: Source, part: Slice, recipe: Recipe, limit: int | None = None) -> Places:
    """From shapes alone: aligned to 64 KiB from 1 MiB on, else to 64 bytes. ``limit``: bytes a file holds at most,
    where no single tensor is larger. Raises Usage for a form, type or shape that is not that of the bytes.
    """
    found = tensors_of(source, part)
    places: dict[Key, Place] = {}
    sizes = [0]
    for stored in weights:
        length = checked(stored, found, plain(recipe))
        if stored.key in places:
            continue
        step = WIDE_STEP if length >= WIDE else STEP
        offset = -(-sizes[-1] // step) * step
        if limit is not None and offset and offset + length > limit:
            sizes.append(0)
            offset = 0
        places[stored.key] = Place(len(sizes) - 1, offset, length)
        sizes[-1] = offset + length
    return Places(tuple(weights), places, tuple(sizes))


def plain(recipe: Recipe) -> Recipe:
    """float16 is a type of initializers, not a way of keeping weights: values are rounded once, as ``dtype`` says."""
    return Recipe("float32", "float32") if recipe.precision == "float16" else recipe


def tensors_of(source: Source, part: Slice) -> dict[str, Kept]:
    """Every tensor of the slice, by its name in it."""
    return kept(source.model, part, sliced(source.model, part))


def checked(stored: Stored, found: Mapping[str, Kept], recipe: Recipe) -> int:
    """Bytes of what an initializer is, or is a band of, once it is one that can be made."""
    form = FORMS.get(stored.form)
    if form is None or len(stored.sources) != form.sources or any(name not in found for name in stored.sources):
        raise refused(stored, f"{stored.form} of {', '.join(stored.sources)}", "a form and the tensors it is made of")
    tensors = [found[name] for name in stored.sources]
    first, kind = tensors[0], tensors[0].stored(recipe)
    if any(t.shape != first.shape or t.stored(recipe) != kind for t in tensors):
        raise refused(stored, "tensors that differ in shape or format", "equal ones")
    if (form.quantized and kind not in BITS) or (len(first.shape) == 1 and form != FORMS["values"]):
        raise refused(stored, f"{stored.form} of {kind} {list(first.shape)}", "a matrix in blocks, or its values")
    if stored.dtype not in types(form.base, kind):
        raise refused(stored, f"type {stored.dtype}", f"one of {types(form.base, kind)}")
    rows, cols = matrix(first.shape)
    nbytes = form_bytes(form.base, stored.dtype, kind, rows * form.sources, cols)
    band = stored.band or Band(0, rows * form.sources, rows * form.sources)
    if band.of != rows * form.sources or not 0 <= band.first < band.stop <= band.of or (stored.band and form.turned):
        raise refused(stored, f"rows {list(band)}", f"some of {rows * form.sources}, of a form in rows")
    held = nbytes // band.of * (band.stop - band.first)
    if declared(stored) != held:
        raise refused(stored, f"shape {list(stored.shape)}", f"one of {held} bytes")
    return nbytes


def refused(stored: Stored, found: str, expected: str) -> Usage:
    """An initializer that cannot be made: a graph and its weights do not agree."""
    return Usage(found, field=stored.name, expected=expected)


def declared(stored: Stored) -> int:
    """Bytes of an initializer by its type and shape."""
    count = math.prod(stored.shape)
    return -(-count // 2) if stored.dtype == TensorProto.INT4 else count * FLOATS.get(stored.dtype, 1)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns; a vector is a row."""
    return math.prod(shape[:-1]), shape[-1]


def attach(model: onnx.ModelProto, places: Places, location: str) -> None:
    """Points every initializer of ``places`` in ``model`` at its bytes, in files called after ``location``.

    Raises Usage for one that the model lacks, or declares otherwise.
    """
    files = places.files(location)
    there = {initializer.name: initializer for initializer in model.graph.initializer}
    for stored in places.weights:
        tensor = there.get(stored.name)
        if tensor is None or (tensor.data_type, tuple(tensor.dims)) != (stored.dtype, stored.shape):
            raise refused(stored, "no such initializer in the graph", f"type {stored.dtype}, shape {stored.shape}")
        place = places.of(stored)
        tensor.ClearField("raw_data")
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": files[place.file], "offset": place.offset, "length": place.length}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))


def write(
    path: Path, places: Places, source: Source, part: Slice, recipe: Recipe, notify: Notify = lambda *_: None
) -> dict[str, str]:
    """Writes the files, the first at ``path``: file name -> its sha256. None of them is left when it fails.

    Raises BadCheckpoint (weights that the type cannot hold), ReadFailed (full disk), CannotCreate, NotPermitted.
    """
    names = places.files(path.name)
    with ExitStack() as stack:
        files = [stack.enter_context(Output(path.with_name(n), s)) for n, s in zip(names, places.sizes, strict=True)]
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        Writing(places, files, source, part, plain(recipe), pool, notify).run()
        return {name: file.sha256() for name, file in zip(names, files, strict=True)}


class Writing:
    """One export of weights under way."""

    def __init__(
        self,
        places: Places,
        files: Sequence[Output],
        source: Source,
        part: Slice,
        recipe: Recipe,
        pool: ThreadPoolExecutor,
        notify: Notify,
    ) -> None:
        self.places, self.files, self.source, self.recipe, self.pool = places, files, source, recipe, pool
        self.notify = notify
        self.windows, self.tensors = parts(source.model, part), tensors_of(source, part)
        self.left = dict(places.places)
        self.total, self.done = sum(place.length for place in self.left.values()), 0

    def run(self) -> None:
        """Everything, in the order of the file: of what is made of the same codes or values all at once."""
        groups: dict[tuple[tuple[str, ...], bool], list[Key]] = {}
        for key in self.left:
            groups.setdefault((key[2], FORMS[key[1]].quantized), []).append(key)
        for together in groups.values():
            odd = [key for key in together if self.is_odd(key)]
            for key in odd:
                self.columns(key)
            self.rows(tuple(key for key in together if key not in odd))
            for key in together:
                del self.left[key]
            self.sum_up()

    def sum_up(self) -> None:
        """Files up to the first place that is not written yet are as they will be."""
        for i, file in enumerate(self.files):
            file.finished(min((p.offset for p in self.left.values() if p.file == i), default=file.size))

    def rows(self, keys: tuple[Key, ...]) -> None:
        """Forms whose bytes follow from bands of rows."""
        if keys:
            self.put([self.sink(key) for key in keys], self.bands(keys))

    def columns(self, key: Key) -> None:
        """int4 codes by columns, of a matrix with an odd number of rows: a line may end inside a byte."""
        window, shape = self.windows[key[2][0]], self.tensors[key[2][0]].full
        self.put([Sink(self.files[self.left[key].file], self.left[key].offset)], self.odd_bands(window, shape))

    def put(self, sinks: Sequence[Sink], jobs: Iterable[Callable[[], tuple[Bytes, ...]]]) -> None:
        """Takes bands from the pool to where they belong."""
        for made in ordered(self.pool, jobs):
            for sink, data in zip(sinks, made, strict=True):
                sink.put(data)
                self.done += data.nbytes
            self.notify("exporting", self.done, self.total)

    def sink(self, key: Key) -> Sink:
        """Where the bands of a form go."""
        dtype, form, sources = key
        place, shape = self.left[key], self.tensors[sources[0]].shape
        line = None
        if FORMS[form].turned:
            line = shape[-2] // 2 if dtype == TensorProto.INT4 else shape[-2] * FLOATS.get(dtype, 1)
        return Sink(self.files[place.file], place.offset, line)

    def bands(self, keys: tuple[Key, ...]) -> Iterator[Callable[[], tuple[Bytes, ...]]]:
        """Bands of rows in every form of ``keys``, which are made of the same."""
        sources, quantized = keys[0][2], FORMS[keys[0][1]].quantized
        count = TALL if any(FORMS[form].turned for _, form, _ in keys) else BAND
        read = code_bands if quantized else value_bands
        kind = self.tensors[sources[0]].stored(self.recipe)
        found = (read(self.source, self.windows[name], self.recipe, count) for name in sources)
        make = self.from_codes if quantized else self.from_values
        for jobs in zip(*found, strict=True):
            yield partial(self.blaming, sources, partial(make, jobs, keys, kind))

    def from_values(self, jobs: Sequence[Callable[[], Floats]], keys: tuple[Key, ...], kind: str) -> tuple[Bytes, ...]:
        """One band of values in every form."""
        found = [job() for job in jobs]
        values = found[0] if len(found) == 1 else interleaved(*found)
        return tuple(of_values(values, FORMS[form].base, dtype) for dtype, form, _ in keys)

    def from_codes(
        self, jobs: Sequence[Callable[[], tuple[Codes, Scales]]], keys: tuple[Key, ...], kind: str
    ) -> tuple[Bytes, ...]:
        """One band of codes and scales in every form."""
        found = [job() for job in jobs]
        codes, scales = found[0]
        cols = self.tensors[keys[0][2][0]].shape[-1]
        if len(found) > 1:
            codes, scales = (interleaved(a, b) for a, b in zip(*found, strict=True))
        return tuple(of_codes(codes, scales, FORMS[form].base, dtype, kind, cols) for dtype, form, _ in keys)

    def odd_bands(self, part: Part, shape: tuple[int, ...]) -> Iterator[Callable[[], tuple[Bytes, ...]]]:
        """Whole lines, some blocks of them at a time."""
        assert part.window.cols is not None
        ((start, stop),) = part.window.cols
        for rows in matrices(shape, part.window):
            step = max(1, TALL // BLOCK // Window(rows, None).count) * BLOCK
            for first in range(start, stop, step):
                window = Window(rows, ((first, min(first + step, stop)),))
                yield partial(self.odd_band, Part(part.name, window))

    def odd_band(self, part: Part) -> tuple[Bytes, ...]:
        """Lines of nibbles without a gap between them."""
        found = [job()[0] for job in code_bands(self.source, part, self.recipe, BAND)]
        return (turned_odd(np.concatenate(found)),)

    def is_odd(self, key: Key) -> bool:
        """Whether bands of rows would end inside a byte of every line."""
        if key[0] != TensorProto.INT4:
            return False
        part, shape = self.windows[key[2][0]], self.tensors[key[2][0]].full
        return any((b - a) % 2 for ranges in matrices(shape, part.window) for a, b in ranges)

    def blaming(self, sources: tuple[str, ...], job: Callable[[], T]) -> T:
        """What ``job`` returns; what a type cannot hold is refused by the names of its tensors."""
        try:
            return job()
        except BadCheckpoint as e:
            if e.file is not None:
                raise
            field = ", ".join(self.windows[name].name for name in sources)
            raise BadCheckpoint(e.found, file=self.source.folder, field=field, expected=e.expected) from None


@dataclass
class Sink:
    """Where bands of one form go: one after another, or, with ``line`` bytes a line, one beside another.

    When lines are full the next matrix of a stack begins behind them.
    """

    file: Output
    offset: int
    line: int | None = None
    left: int = 0

    def put(self, data: Bytes) -> None:
        """The next band."""
        if self.line is None:
            self.file.put(data, self.offset)
            self.offset += data.nbytes
            return
        width = data.nbytes // len(data)
        self.file.put_strips(data, width, self.offset + self.left, self.line)
        self.left += width
        if self.left == self.line:
            self.left, self.offset = 0, self.offset + data.nbytes // width * self.line
