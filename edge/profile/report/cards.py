"""The first screen: what must be said first, and an answer a budget."""

from __future__ import annotations

import re

from edge.profile.report.book import Book, Group
from edge.profile.report.case import Case
from edge.profile.report.chart import NAMED, component_colour, component_title
from edge.profile.report.markup import Markup, join, safe, tag
from edge.profile.report.words import BLANK, rate, seconds, share, size, whole

BADGES = {"ok": "kept", "over budget": "over budget", "noisy": "noisy", "refused": "does not fit"}


def warnings(book: Book) -> Markup:
    """A list, the gravest first; nothing where all is well."""
    words = {"bad": "Wrong", "doubt": "In doubt", "note": "Note"}
    items = [tag("li", tag("b", words[kind]), " ", text, class_=kind) for kind, text in book.warnings]
    return tag("ul", *items, class_="warnings", aria_label="Warnings") if items else Markup("")


def cards(book: Book) -> Markup:
    """A card a budget; other runtimes last."""
    made = [card(book, group) for group in book.groups] + [peer_card(peer) for peer in book.peers]
    return join(
        tag("h2", "An answer for every budget", class_="unseen"), tag("div", *made, class_="cards"), prompt_note(book)
    )


def badge(case: Case) -> Markup:
    """One word on how it went."""
    trouble = case.trouble
    if not trouble and case.kept is None:
        return Markup("")
    return tag("span", BADGES.get(trouble or "ok", trouble), class_=f"badge {(trouble or 'ok').replace(' ', '-')}")


def card(book: Book, group: Group) -> Markup:
    """Budget, tokens a second, and the rest of the answer as a sentence."""
    case = group.best
    top = tag("h3", tag("span", group.name, class_="budget"), " ", badge(case))
    frame = {"class_": f"card {case.trouble.replace(' ', '-')}".strip(), "style": f"--mark:{group.colour}"}
    if case.status == "refused":
        needs = tag("p", glued(case.needs()), class_="hero none")
        nearest = f"The nearest: {case.text('label')}." if case.text("label") else case.text("why")
        return tag("article", top, needs, tag("p", nearest, class_="answer"), **frame)
    hero = Markup("")
    if case.decode:
        hero = tag("p", tag("b", rate(case.decode.mean)), " tokens/s", class_="hero")
    return tag(
        "article",
        top,
        hero,
        tag("p", answer(case), class_="answer"),
        bar(book, case),
        others(book, group),
        **frame,
    )


def answer(case: Case) -> Markup:
    """full in int4, first token after 7.1 s, peak 1.75 GB."""
    wait = f"first token after {seconds(case.wait)}" if case.wait else ""
    text = ", ".join(filter(None, [case.brief, wait, f"peak {size(case.peak)}" if case.peak else ""]))
    return glued(text + "." if text else case.text("why"))


def glued(text: str) -> Markup:
    """Text whose numbers stay beside their units."""
    return Markup(re.sub(r"(?<=\d) (?=(?:ms|s|min|[kMGTPE]?B)\b)", "&nbsp;", safe(text)))


def prompt_note(book: Book) -> Markup:
    """Of which prompt the cards' first token is."""
    lengths = sorted({group.best.wait_tokens for group in book.groups if group.best.wait_tokens})
    if not lengths:
        return Markup("")
    peak = "of the whole process" + ("; on a GPU, of its memory" if any(c.on_device for c in book.ours) else "")
    words = " to ".join(dict.fromkeys([whole(lengths[0]), whole(lengths[-1])]))
    return tag(
        "p",
        f"First token: of a prompt of {words} tokens, the model loaded. Peak: {peak}.",
        class_="about small",
    )


def bar(book: Book, case: Case) -> Markup:
    """The budget as a bar, filled by component."""
    held = case.components
    full = max(case.budget_bytes or 0.0, case.peak or 0.0, sum(held.values()))
    if not held or not full or case.on_device:
        return Markup("")
    unknown = [name for name in book.components if name not in NAMED]
    pieces = [
        tag("i", style=f"width:{amount / full * 100:.2f}%;background:{component_colour(name, unknown)}",
            title=f"{component_title(name)} {size(amount)}")
        for name, amount in held.items()
    ]  # fmt: skip
    part = (
        f"{share(case.peak / case.budget_bytes)} of {case.budget}"
        if case.peak and case.budget_bytes
        else "what is held"
    )
    words = ", ".join(f"{component_title(name)} {size(amount)}" for name, amount in held.items())
    return tag("div", *pieces, class_="bar", role="img", aria_label=f"{part}: {words}")


def others(book: Book, group: Group) -> Markup:
    """Every context of the budget, a row each."""
    if not book.many_contexts:
        return Markup("")
    rows = []
    for case in group.cases:
        trouble = tag("em", case.trouble) if case.trouble not in ("", "refused") else ""
        speed = rate(case.decode.mean) if case.decode else BLANK
        peak = size(case.peak) if case.peak else case.needs() if case.status == "refused" else BLANK
        rows.append(
            tag(
                "tr", tag("th", whole(case.asked_context), " ", trouble, scope="row"), tag("td", speed), tag("td", peak)
            )
        )
    heads = (tag("th", name, scope="col") for name in ("context", "speed", "peak"))
    return tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_="others")


def peer_card(peer: Case) -> Markup:
    """Another runtime's answer, for comparison."""
    hero = tag("p", tag("b", rate(peer.decode.mean)), " tokens/s", class_="hero") if peer.decode else Markup("")
    top = tag("h3", tag("span", peer.name, class_="budget"), " ", badge(peer))
    label = peer.text("label")
    text = join(
        f"{label}, " if label and label != peer.name else "",
        "keeps no budget",
        f", peak {size(peer.peak)}." if peer.peak else ".",
    )
    return tag("article", top, hero, tag("p", text, class_="answer"), class_="card peer", style="--mark:var(--peer)")
