"""What is said in tables alone: plans, disk and energy, control groups, other runtimes, the machine."""

from __future__ import annotations

from collections.abc import Sequence

from edge.profile.report.book import Book
from edge.profile.report.case import Case, finite, mapping, positive, sequence, test_of
from edge.profile.report.chart import Table, component_title
from edge.profile.report.markup import Markup, join, tag
from edge.profile.report.words import BLANK, digits, listed, rate, share, signed_share, size, times, whole

TIERS = {"device": "on the device", "ram": "in RAM", "ssd": "on SSD", "none": "none"}


def kind_of(case: Case) -> str | None:
    """The class of a case's row: what is wrong with it."""
    return case.trouble.replace(" ", "-") or None


def plan_table(book: Book) -> Markup:
    """What was planned for every case; of refused ones what they would take."""
    columns = ["case", "outcome", "slice", "precision", "PLE table", "context", "keys and values", "total", "peak"]
    table = Table([*columns, "plan off by"])
    for case in book.ours:
        head, precision = case.text("plan", "head"), case.text("plan", "precision")
        made = f"{precision}, head {head}" if head and head != precision else precision
        needs = ": ".join(filter(None, [case.needs(), case.text("label")]))
        table.add(
            book.title(case),
            needs if case.status == "refused" else case.trouble or "ok",
            case.text("plan", "slice") or BLANK,
            made or BLANK,
            TIERS.get(case.text("plan", "ple"), BLANK),
            whole(case.context),
            case.text("plan", "kv") or BLANK,
            size(case.above("plan", "total_bytes") or case.above("needed_bytes")),
            size(case.peak),
            signed_share(case.number("predicted", "memory_error")),
            kind=kind_of(case),
        )
    return table.html()


def component_table(book: Book) -> Markup:
    """Planned bytes by component."""
    names = list(dict.fromkeys(name for case in book.ours for name in mapping(case.get("plan", "bytes"))))
    table = Table(["case", *(component_title(name) for name in names), "total"], "Planned, by component")
    for case in book.ours:
        parts = mapping(case.get("plan", "bytes"))
        if parts:
            sizes = [size(positive(parts.get(name))) for name in names]
            table.add(book.title(case), *sizes, size(case.above("plan", "total_bytes")), kind=kind_of(case))
    return table.html()


def cost_table(book: Book) -> Markup:
    """What a token takes of the socket and of the disk; under it, why no energy was counted where none was."""
    columns = ["case", "energy a token", "counted by", "from storage a token", "PLE rows", "PLE hit rate"]
    table = Table([*columns, "PLE bytes a token", "waited for PLE"])
    whys = []
    for case in (*book.ours, *book.peers):
        if not case.tests:
            continue
        joules = case.above("energy", "joules_per_token")
        whys += [] if joules else [case.text("energy", "why") or "nothing was asked of a counter"]
        waited = case.number("ple", "wait_s")
        table.add(
            book.title(case),
            f"{digits(joules)} J" if joules else BLANK,
            case.text("energy", "source") or BLANK,
            size(case.number("storage", "bytes_per_token")),
            whole(case.number("ple", "rows")),
            share(case.number("ple", "hit_rate")),
            size(case.number("ple", "bytes_per_token")),
            f"{waited * 1000:,.0f} ms" if waited is not None else BLANK,
        )
    why = f"No energy{' for some' if len(whys) < len(table.rows) else ''}: {listed(list(dict.fromkeys(whys)), 3)}."
    return join(tag("p", why, class_="about") if whys else "", table.html())


def box_table(book: Book) -> Markup:
    """Runs inside a control group whose hard limit is the budget."""
    boxes = [(case, Case(mapping(case.get("boxed")))) for case in book.ours]
    boxes = [(case, box) for case, box in boxes if box.line]
    names = list(dict.fromkeys(name for _, box in boxes for name in box.tests))
    table = Table(
        ["case", "outcome", "limit", "peak", "killed for memory", "same tokens", *(f"{n}, tokens/s" for n in names)],
        "Tokens a second inside, and the share of the speed outside",
    )
    for case, box in boxes:
        said = box.get("same_tokens")
        same = ("yes" if said else "no") if isinstance(said, bool) else BLANK
        outcome = ": ".join(filter(None, [box.status, box.text("why")]))
        cells = [inside(case, box, name) for name in names]
        kills = whole(box.number("oom_kills"))
        wrong = box.status != "ok" or same == "no" or kills not in ("0", BLANK)
        table.add(
            book.title(case),
            outcome,
            size(box.above("limit_bytes")),
            size(box.above("peak_bytes")),
            kills,
            same,
            *cells,
            kind="failed" if wrong else None,
        )
    return table.html()


def inside(case: Case, box: Case, name: str) -> str:
    """A speed in the control group, and what part of the free one it is."""
    found, free = box.tests.get(name), case.tests.get(name)
    if found is None:
        return BLANK
    return rate(found.mean) + (f", {share(found.mean / free.mean)}" if free else "")


def peer_tables(book: Book) -> Markup:
    """For every other runtime: ours beside it, as ratios."""
    return join(*(peer_table(book, peer) for peer in book.peers))


def peer_table(book: Book, peer: Case) -> Markup:
    """One runtime's own numbers, then every case of ours on the same model over them."""
    names = sorted(peer.tests, key=lambda name: (test_of(name).kind, test_of(name).depth, test_of(name).tokens))
    table = Table(["case", *(f"{name}, tokens/s" for name in names), "peak memory"], peer.text("label") or peer.name)
    table.add(
        peer.name, *(rate(peer.tests[n].mean, peer.tests[n].deviation) for n in names), size(peer.peak), kind="peer"
    )
    for case in book.ran:
        shared = [n for n in names if n in case.tests]
        other = peer.text("model", "name") and case.text("model", "name") != peer.text("model", "name")
        if not shared or other:
            continue
        ratios = [beside(case, peer, n) if n in shared else BLANK for n in names]
        memory = f"{size(case.peak)}, {times(case.peak / peer.peak)}" if case.peak and peer.peak else size(case.peak)
        table.add(book.title(case), *ratios, memory, kind=kind_of(case))
    return table.html()


def beside(case: Case, peer: Case, name: str) -> str:
    """Our speed, and how many times theirs it is."""
    ours, theirs = case.tests[name].mean, peer.tests[name].mean
    return f"{rate(ours)}, {times(ours / theirs)}"


def facts(book: Book) -> Markup:
    """The machine, the model, the versions; where lines differ, each answer."""
    rows = [
        ("model", book.one("model", "name")),
        ("family", book.one("model", "family")),
        ("parameters", numbers(book, whole, "model", "parameters")),
        ("weights", book.one("model", "weights")),
        ("fingerprint", book.one("model", "fingerprint")),
        ("processor", book.one("machine", "cpu")),
        (
            "cores, threads",
            join_pair(numbers(book, whole, "machine", "cores"), numbers(book, whole, "machine", "threads")),
        ),
        ("vector instructions", book.one("machine", "vector")),
        ("memory", numbers(book, size, "machine", "memory_bytes")),
        ("memory reads", numbers(book, lambda v: f"{digits(v)} GB/s", "bandwidth", "read_gbps")),
        ("GPU", book.one("machine", "gpu")),
        ("system", book.one("machine", "system")),
        ("engines", book.one("asked", "engine")),
        ("repeated", numbers(book, lambda v: f"{whole(v)} times", "asked", "repeat")),
        *((name, book.one("versions", name)) for name in versions(book.cases)),
        ("measured", book.one("time")),
    ]
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in rows if value]
    return tag("dl", *pairs, class_="facts")


def versions(cases: Sequence[Case]) -> list[str]:
    """What has a version."""
    return list(dict.fromkeys(name for case in cases for name in mapping(case.get("versions"))))


def join_pair(left: str, right: str) -> str:
    """Two answers beside each other."""
    return ", ".join(filter(None, [left, right]))


def numbers(book: Book, write: object, *path: str) -> str:
    """What the cases say at a path, as ``write`` puts it, least first, at most four answers."""
    found = sorted({n for case in book.cases for n in [positive(case.get(*path))] if n})
    texts = list(dict.fromkeys(write(n) for n in found)) if callable(write) else []
    return ", ".join(texts if len(texts) <= 4 else [texts[0], "…", texts[-1]])


def noise_table(book: Book) -> Markup:
    """What else the machine did."""
    table = Table(["case", "busy", "other work, cores", "why"])
    for case in book.cases:
        others = finite(case.get("noise", "others_cores"))
        if case.get("noise") is None:
            continue
        whys = "; ".join(str(why) for why in sequence(case.get("noise", "why")))
        used = digits(others, 2) if others is not None and others >= 0 else BLANK
        table.add(
            book.title(case), "yes" if case.noisy else "no", used, whys or BLANK, kind="noisy" if case.noisy else None
        )
    return table.html()


METHOD = (
    (
        "Every case",
        "is a process of its own, fresh; memory is sampled fifty times a second from outside, and the peak is "
        "the kernel's own high-water mark, read inside the process.",
    ),
    (
        "Peak",
        "counts everything a process holds, libraries and file-backed pages included; on a GPU, what the device "
        "holds more than before, its context included.",
    ),
    ("Components", "are what the ledger counted: every large buffer is entered before it is taken."),
    (
        "Tokens per second",
        "are named as llama-bench names them: pp512 reads a prompt of 512 tokens, tg128 writes 128, "
        "@ d4096 does so after 4,096. Means of several runs; ± is the sample's standard deviation.",
    ),
    (
        "First token",
        "is from the prompt's arrival until a token comes out, the model loaded; cold starts have the "
        "model's files out of the page cache and include loading.",
    ),
    ("p50, p95, p99", "are of the time between two tokens."),
    (
        "Reading",
        "is bytes of weights a token needs, times tokens a second, against what memory was measured "
        "to read with the same threads, before and after the run.",
    ),
    ("Predicted", "is what the planner said before anything was loaded; off by is predicted over measured, less one."),
    ("Noisy", "is a run beside which other processes worked or the memory's speed changed."),
)


def method() -> Markup:
    """How each figure was measured."""
    return tag("dl", *(join(tag("dt", term), tag("dd", text)) for term, text in METHOD), class_="method")
