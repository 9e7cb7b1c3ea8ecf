"""Chat templates: Jinja from a file nobody vouches for, in a sandbox that bounds escape and cost.

Jinja's own sandbox stops escape. Cost is bounded by one rule: every value a template builds is measured, fully
expanded, when it is built, and the sum over a rendering is limited; loops and calls check a step limit and a deadline.
"""

from __future__ import annotations

import os
import secrets
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

from loaders.errors import BadCheckpoint, EdgeError, Unsupported, Usage
from loaders.text.jinja import Cost, environment
from loaders.text.tokenizer import AnyTokenizer, clean

MAX_TEMPLATE = 1 << 20
MAX_CONFIG = 32 << 20
ROLES = frozenset({"system", "user", "assistant", "model", "tool", "developer", "function"})
TEXTS = frozenset({"content", "name", "reasoning_content", "thinking"})


class ChatTemplate:
    """A compiled chat template. ``bos_token`` and the like are those of tokenizer_config.json."""

    def __init__(self, source: str, tokens: dict[str, str] | None = None, file: str = "chat_template") -> None:
        """Raises BadCheckpoint for a template that does not compile, Unsupported for an unknown filter or test."""
        import jinja2

        self.file, self.tokens = file, dict(tokens or {})
        self._cost, self._lock = Cost(), threading.Lock()
        if len(source) > MAX_TEMPLATE:
            raise BadCheckpoint(f"{len(source)} characters", file=file, expected=f"at most {MAX_TEMPLATE}")
        try:
            self._cost.begin(datetime.now())
            self._template = environment(self._cost).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            kind = Unsupported if str(error.message).startswith("No ") else BadCheckpoint
            raise kind(f"the chat template: {error.message}", file=file, field=f"line {error.lineno}") from error
        except EdgeError:
            raise
        except (Exception, RecursionError) as error:
            raise BadCheckpoint(f"the chat template does not compile: {error}", file=file) from error

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ChatTemplate | None:
        """The template of the checkpoint in ``folder``, or None if it has none.

        chat_template.jinja wins over the one in tokenizer_config.json; of several named ones ``default`` is taken.
        Raises BadCheckpoint for one over 1 MiB or one that does not compile, Unsupported if none is the default.
        """
        from loaders.formats.config import read_bytes, read_json

        path, file = Path(folder, "tokenizer_config.json"), Path(folder, "chat_template.jinja")
        config = read_json(path, MAX_CONFIG) if os.path.lexists(path) else {}
        tokens = {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[key] = value
            elif value is not None:
                raise BadCheckpoint(repr(value)[:80], file=path, field=key, expected="a string")
        if os.path.lexists(file):
            try:
                return cls(read_bytes(file, MAX_TEMPLATE).decode("utf-8"), tokens, str(file))
            except UnicodeDecodeError as error:
                raise BadCheckpoint(f"not UTF-8 at byte {error.start}", file=file) from error
        source = _default(config.get("chat_template"), path)
        return None if source is None else cls(source, tokens, str(path))

    def render(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True, enable_thinking: bool | None = None
    ) -> str:
        """The prompt for ``messages``, each with a ``role`` and ``content``.

        Raises Usage for messages the template refuses, BadCheckpoint when it fails, or costs too much.
        """
        return self._render(self._checked(messages), datetime.now(), add_generation_prompt, enable_thinking)

    def _render(self, messages: list[dict[str, str]], now: datetime, generate: bool, thinking: bool | None) -> str:
        given: dict[str, Any] = {**self.tokens, "messages": [dict(m) for m in messages]}
        given |= {"tools": None, "documents": None, "add_generation_prompt": generate}
        if thinking is not None:
            given["enable_thinking"] = thinking
        with self._lock:
            try:
                self._cost.begin(now)
                return self._cost.collect(self._template.generate(given))
            except Usage:
                raise
            except (Exception, RecursionError) as error:
                what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise BadCheckpoint(f"the chat template failed: {what}", file=self.file) from error

    @staticmethod
    def _checked(messages: list[dict[str, str]]) -> list[dict[str, str]]:
        total, out = 0, []
        for at, message in enumerate(messages):
            extra = sorted(set(message) - TEXTS - {"role"}, key=str)
            if extra or not all(isinstance(value, str) for value in message.values()):
                raise Usage(extra or "not a text", field=f"messages[{at}]", expected="role and content, both strings")
            if message.get("role") not in ROLES:  # templates build control tokens from it
                raise Usage(repr(message.get("role")), field=f"messages[{at}].role", expected=", ".join(sorted(ROLES)))
            total += sum(map(len, message.values()))
            out.append({key: clean(value) for key, value in message.items()})
        if not out or total > Cost.OUTPUT:
            found = f"{total} characters" if out else "none"
            raise Usage(found, field="messages", expected=f"at least one message, at most {Cost.OUTPUT} characters")
        return out


def _default(value: Any, path: Path) -> str | None:
    if isinstance(value, list):
        named = {v["name"]: v.get("template") for v in value if isinstance(v, dict) and isinstance(v.get("name"), str)}
        if "default" not in named:
            names = "templates named " + (", ".join(sorted(named)) or "nothing")
            raise Unsupported(names, file=path, field="chat_template", expected="one named default")
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise BadCheckpoint(type(value).__name__, file=path, field="chat_template", expected="a string")
    return value


def encode_chat(
    template: ChatTemplate,
    tokenizer: AnyTokenizer,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = True,
    enable_thinking: bool | None = None,
) -> list[int]:
    """The ids of the rendered prompt, with special tokens only where the template itself put them.

    Special tokens spelt out in a message, or assembled from several, are plain text. Raises what ``render`` raises,
    and Usage when a message spells one and the template rewrites messages so that theirs cannot be told from its own.
    """
    messages, now = template._checked(messages), datetime.now()

    def render(them: list[dict[str, str]]) -> str:
        return template._render(them, now, add_generation_prompt, enable_thinking)

    def control(ids: list[int]) -> list[int]:
        return [i for i in ids if i in tokenizer.control_ids]

    whole = render(messages)
    ids, offsets = tokenizer.encode_spans(whole)
    expected: list[int] | None = None
    for only_suspicious in (False, True):
        # Second try: messages that cannot take part in a special token stay, for templates that look into them.
        hidden: dict[str, str] = {}
        masked = [dict(message) for message in messages]
        for message in masked:
            for key, value in message.items():
                if key != "role" and value.strip() and not (only_suspicious and not _suspicious(tokenizer, value)):
                    nonce = f"x{secrets.token_hex(16)}x"
                    hidden[nonce], message[key] = value, nonce
        skeleton = render(masked)
        if expected is None:
            expected = control(tokenizer.encode_marked(skeleton))
        pieces = _locate(whole, skeleton, hidden)
        if pieces is None:
            continue
        own = [i for text, user in pieces if not user for i in control(tokenizer.encode_marked(text))]
        if only_suspicious and own != expected:
            break
        if own == control(ids) and not _touched(tokenizer, ids, offsets, whole, pieces):
            return ids
        out: list[int] = []
        for at, (text, user) in enumerate(pieces):
            out += tokenizer.encode_piece(text, plain=user, start=at == 0)
        return out
    raise Usage(
        "the chat template rewrites messages, and a message may spell a special token",
        field="messages",
        hint="Take what looks like a special token out of the message, or use --no-chat.",
    )


def _suspicious(tokenizer: AnyTokenizer, text: str) -> bool:
    """Whether ``text`` holds a special token, or could be a part of one together with what stands around it."""
    if tokenizer.control_ids.intersection(tokenizer.encode_marked(text)):
        return True
    for token in tokenizer.special_texts:
        if text.strip() in token or any(text.rstrip().endswith(token[:k]) for k in range(1, len(token))):
            return True
        if any(text.lstrip().startswith(token[k:]) for k in range(1, len(token))):
            return True
    return False


def _locate(whole: str, skeleton: str, hidden: dict[str, str]) -> list[tuple[str, bool]] | None:
    """``whole`` in pieces, each with whether it is a user's; None if it is not ``skeleton`` with the texts put in."""
    parts: list[tuple[str, bool]] = []
    at = 0
    for place, nonce in sorted((i, key) for key in hidden for i in _all(skeleton, key)):
        parts += [(skeleton[at:place], False), (nonce, True)]
        at = place + len(nonce)
    parts.append((skeleton[at:], False))
    # Templates strip some texts and not others: every end that the pieces so far can have, and how it came about.
    ends: list[dict[int, tuple[int, str]]] = [{0: (0, "")}]
    for text, user in parts:
        value = hidden[text] if user else text
        choices = (value, value.strip(), value.lstrip(), value.rstrip()) if user else (value,)
        found: dict[int, tuple[int, str]] = {}
        for start in ends[-1]:
            for choice in choices:
                if whole.startswith(choice, start):
                    found.setdefault(start + len(choice), (start, choice))
        ends.append(found)
    if len(whole) not in ends[-1]:
        return None
    pieces: list[tuple[str, bool]] = []
    end = len(whole)
    for (_, user), found in zip(reversed(parts), reversed(ends[1:]), strict=True):
        end, text = found[end]
        pieces.append((text, user))
    return [piece for piece in reversed(pieces) if piece[0]]


def _all(text: str, part: str) -> list[int]:
    out, at = [], text.find(part)
    while at >= 0:
        out.append(at)
        at = text.find(part, at + len(part))
    return out


def _touched(
    tokenizer: AnyTokenizer, ids: list[int], offsets: list[tuple[int, int]], whole: str, pieces: list[tuple[str, bool]]
) -> bool:
    """Whether a special token stands, if only in part, in a user's piece."""
    mine = bytearray()
    for text, user in pieces:
        mine += (b"\1" if user else b"\0") * len(text)
    for token, (a, b) in zip(ids, offsets, strict=True):
        # a token may take the blanks around it along (lstrip, rstrip)
        if token in tokenizer.control_ids and any(mine[i] and not whole[i].isspace() for i in range(a, b)):
            return True
    return False
