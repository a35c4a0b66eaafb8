"""The scan of a pickle before it is loaded reads it as Python does."""

from __future__ import annotations

import pickle
import pickletools
import random
from typing import Any

import pytest

from pymerge.checkpoint.pickles import Refused, check_operations

LONG = "x" * (3 << 20)  # more than a block that is read at a time
OBJECTS: dict[str, Any] = {
    "numbers": [0, 1, 300, 70_000, -5, 1 << 70, -(1 << 3000), 2.5, True, None],
    "texts": ["", "a", "b" * 300, "\u00e9\n'", LONG, b"", b"c" * 300, bytes(70_000), LONG * 2],
    "nested": {"a": [(1, 2), (3,), {4, 5}, frozenset([6])], (7, 8): {"b": ()}},
    "shared": (lambda x: [x, x, {"x": x}])(["same"]),
    "many": [f"name{number}" for number in range(5000)],
    "classes": [complex(1, 2), range(3), random.Random, slice(1, 2)],
}


def operations(content: bytes) -> int:
    return sum(1 for _ in pickletools.genops(content))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", [each for each in OBJECTS if each != "texts"])
def test_every_operation_is_counted(name: str, protocol: int) -> None:
    content = pickle.dumps(OBJECTS[name], protocol)
    count = operations(content)
    check_operations(content, count)
    with pytest.raises(Refused, match=f"more than {count - 1} operations"):
        check_operations(content, count - 1)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_texts_longer_than_a_block(protocol: int) -> None:
    content = pickle.dumps(OBJECTS["texts"], protocol)
    count = operations(content)
    check_operations(content, count)
    with pytest.raises(Refused):
        check_operations(content, count - 1)


@pytest.mark.parametrize("name", ["numbers", "nested", "classes"])
def test_a_cut_pickle_is_none(name: str) -> None:
    content = pickle.dumps(OBJECTS[name], 4)
    for end in range(len(content)):
        with pytest.raises(ValueError, match="ends"):
            check_operations(content[:end])


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\nbytearray\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x09bytearray\x93.",
        b"Vbuiltins\nS'bytearra\\x79'\n\x93.",
        b"\x80\x04X\x14\x00\x00\x00" + b"0123456789 bytearray.",
    ],
)
def test_a_bytearray_by_any_spelling(content: bytes) -> None:
    with pytest.raises(Refused, match="bytearray"):
        check_operations(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x02}r\xff\xff\xff\x3f.", "out of order"),  # a table up to the largest number
        (b"(lp99\n.", "out of order"),
        (b"V" + b"x" * (2 << 20) + b"\n.", "a very long line"),
        (b"\x80\x04(t\x94" + b"h\x00" * 21 + b".", "tuples that repeat"),
        (b"(tp0\n" + b"g0\n" * 21 + b".", "tuples that repeat"),
        (b"(t" + b"2" * 21 + b".", "tuples that repeat"),
    ],
)
def test_what_takes_memory_or_time(content: bytes, said: str) -> None:
    with pytest.raises(Refused, match=said):
        check_operations(content)


@pytest.mark.parametrize("content", [b"", b"\x80\x04\xff.", b"\x8a", b"T\xff\xff\xff\xff."])
def test_what_is_no_pickle(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"ends|operation|negative"):
        check_operations(content)
