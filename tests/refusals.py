"""What every refused configuration must look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loaders.errors import BadCheckpoint, EdgeError, Unsupported
from tests.shrink import parse

EXIT_CODES = {BadCheckpoint: 65, Unsupported: 78}


def change_in(raw: dict[str, Any], change: Callable[[dict[str, Any]], object] | dict[str, Any]) -> None:
    """Makes a configuration one to refuse: by what changes it, or by the keys that are other."""
    if callable(change):
        change(raw)
    else:
        raw.update(change)


def refused(raw: dict[str, Any], error: type[EdgeError], *messages: str) -> None:
    """One line, of the right kind, that names the file, the key and what is wrong; EdgeError stands for either kind."""
    with pytest.raises(EdgeError) as info:
        parse(raw, "some/config.json")
    kind = type(info.value)
    assert kind in EXIT_CODES if error is EdgeError else kind is error, info.value
    assert info.value.exit_code == EXIT_CODES[kind]
    for message in ("some/config.json", *messages):
        assert message in str(info.value)
    assert "\n" not in str(info.value)
