"""A conversation: messages through the checkpoint's own template, replies kept for the next turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edge.generate import Event
from edge.session import Session
from loaders.errors import Unsupported
from loaders.text.template import encode_chat


class Conversation:
    """Turns of one chat. The cache is reused as long as the rendered history goes on where it ended."""

    def __init__(self, session: Session, system: str | None = None) -> None:
        if session.template is None:
            raise Unsupported(
                "no chat template in this checkpoint", file=session.checkpoint.folder, hint="Use --no-chat"
            )
        self.session, self.template = session, session.template
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def ask(self, text: str, **options: Any) -> Iterator[Event]:
        """Adds a user turn and yields the reply's events; what was said stays, also when it was interrupted.

        A turn that is refused, because the context cannot hold it, leaves the history as it was.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        events = self.session.generate(encode_chat(self.template, self.session.tokenizer, turns), **options)
        self.messages, said = turns, []
        try:
            for event in events:
                said.append(event.text)
                yield event
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})
