"""Names in messages: a few and a count; the prefix in which two models' names differ."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pymerge
from pymerge.messages.prefixes import prefixes_between
from pymerge.messages.words import counted, printable, some_names, type_of

ROOT = Path(pymerge.__file__).parent
LAYERS = [f"layers.{i}.{part}.weight" for i in range(30) for part in ("attn.q", "mlp.up", "norm")]


@pytest.mark.parametrize(
    "names, said",
    [
        ([], ""),
        (["a"], "a"),
        (list("abcd"), "a, b, c, d"),
        (list("abcde"), "a, b, c, d and 1 other"),
        (list("abcdef"), "a, b, c, d and 2 others"),
        (list("abcabcdabcd"), "a, b, c, d"),
        (iter("zyxzyxwvut"), "z, y, x, w and 3 others"),
        (range(322), "0, 1, 2, 3 and 318 others"),
    ],
)
def test_at_most_four_names_and_a_count_each_name_once(names, said):
    assert some_names(names) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 values"), (1, "1 value"), (2, "2 values"), (11, "11 values"), (2048, "2,048 values")],
)
def test_a_number_of_things(number, said):
    assert counted(number, "value") == said
    assert counted(number, "entry", "entries") == said.replace("values", "entries").replace(
        "value", "entry"
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [(1, "an int"), ([], "a list"), (None, "a NoneType"), ({}, "a dict"), (object(), "an object")],
)
def test_what_a_value_is(value, said):
    assert type_of(value) == said


def test_no_message_spells_an_article_before_a_type():
    """Nor a plural after a count that may be 1."""
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\ba \{type\(", text), path
        assert not re.search(r"\{len\([^{}]*\)\} (values|matrices|tensors|models) for", text), path


@pytest.mark.parametrize(
    "one, other",
    [
        ("", "_orig_mod."),
        ("module.", ""),
        ("model.", "transformer."),
        ("", "base_model.model."),
        ("model.language_model.", "model."),
    ],
)
def test_the_prefix_in_which_most_names_differ(one, other):
    names = [one + name for name in LAYERS]
    its = [other + name for name in LAYERS] + ["lm_head.weight"]
    assert prefixes_between(names, its) == (one, other)
    assert prefixes_between(its, names) == (other, one)


@pytest.mark.parametrize(
    "one, other",
    [
        ([], []),
        (["a.b"], []),
        (LAYERS, LAYERS),
        (LAYERS, [name.replace("attn", "attention").replace("mlp", "ff") for name in LAYERS]),
        (["weight"], ["bias"]),
        (["x.weight", "x.bias"], ["y.other", "y.another"]),
        # What differs in numbers alone is another layer, of other weights.
        (["layers.0.w", "layers.0.b"], ["layers.1.w", "layers.1.b"]),
        (["left.0.w", "left.0.b"], ["left.11.w", "left.11.b"]),
    ],
)
def test_names_that_differ_by_no_prefix(one, other):
    assert prefixes_between(one, other) is None


@pytest.mark.parametrize("parts", [13, 5000])
def test_of_names_deeper_than_modules_are_no_prefix_is_sought(parts: int) -> None:
    names = [["a." * parts + "w"], ["b." * parts + "w"]]
    assert prefixes_between(*names) is None


def test_of_a_very_long_name_the_beginning_is_said() -> None:
    assert some_names(["a" * 400]) == "a" * 400
    assert some_names(["a" * 4000, "b"]) == f"{'a' * 400}..., b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a/\xfcn\u4e2d\U0001f600 b\nc", "a/\xfcn\u4e2d\U0001f600 b\nc"),
        ("\x1b[2Jx\x07\t\r", "\\x1b[2Jx\\x07\\t\\r"),
        ("\x9b31m\u202e\udcff'\"", "\\x9b31m\\u202e\\udcff'\""),
    ],
)
def test_what_could_steer_a_terminal_is_shown_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown
