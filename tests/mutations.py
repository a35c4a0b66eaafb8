"""Damaged JSON: any value of a document replaced, left out or given twice."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

_HUGE, _TWICE = "@huge@", "@twice@"
VALUES: tuple[Any, ...] = (
    None, True, -1, 1.5, _HUGE, "x", [], {}, [[]], [{}], {"a": 1}, 2**70, "\ud800", "", 0, "../../x",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value, the document's own first; of a long list or object the first three
    and the last.
    """
    yield path
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys if len(keys) < 5 else [*keys[:3], keys[-1]]:
        inner = value[key]
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


def mutated(document: Any) -> Iterator[tuple[str, bytes]]:
    """(what was done, the text) of every mutation."""
    for path in places(document):
        for value in VALUES:
            yield f"{path} = {value!r}", _text(_replaced(document, path, value))
        if path:
            yield f"{path} left out", _text(_without(document, path))
        if path and isinstance(path[-1], str):
            yield f"{path} twice", _text(_twice(document, path))
    whole = _text(document)
    yield "cut short", whole[: len(whole) // 2]
    yield "a BOM in front", b"\xef\xbb\xbf" + whole
    yield "UTF-16", whole.decode().encode("utf-16")
    yield "no UTF-8", whole.replace(b'"', b'"\xff', 2)
    yield "deep", b'{"a":' * 100_000
    yield "deep and whole", whole[:-1] + b',"a":' + b"[" * 300 + b"]" * 300 + b"}"
    yield "a long number", whole[:-1] + b',"a":' + b"9" * 5000 + b"}"
    yield "nothing", b""


def _text(document: Any) -> bytes:
    return json.dumps(document).replace(f'"{_HUGE}"', "1e400").replace(_TWICE, "").encode()


def _parent(document: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    whole = copy.deepcopy(document)
    inner = whole
    for step in path[:-1]:
        inner = inner[step]
    return whole, inner


def _replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    whole, inner = _parent(document, path)
    inner[path[-1]] = value
    return whole


def _without(document: Any, path: tuple[Any, ...]) -> Any:
    whole, inner = _parent(document, path)
    del inner[path[-1]]
    return whole


def _twice(document: Any, path: tuple[Any, ...]) -> Any:
    whole, inner = _parent(document, path)
    inner[f"{path[-1]}{_TWICE}"] = "again"
    return whole
