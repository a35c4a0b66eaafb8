"""Names in messages: a few and a count; the prefix in which two models' names differ."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from folder_cases import family, recipe, write_model

import pymerge
from pymerge.engine.merge import plan_checkpoints
from pymerge.errors import MergeError
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


MANY = 40
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.zeros(5), r"\[16\] in .*base, \[5\] in .*m1, .*m4 and 36 others;"),
        (torch.zeros(16, dtype=torch.int32), "float32 in .*base, int32 in .*m4 and 36 others;"),
    ],
    ids=["shapes", "dtypes"],
)
def test_what_is_said_of_many_folders(tmp_path: Path, bad: torch.Tensor, said: str) -> None:
    names = ["base", *(f"m{k}" for k in range(1, MANY + 1))]
    states = family(MANY, dtype=torch.float32)
    folders = [
        write_model(tmp_path / name, {**state, NORM: bad if k else state[NORM]})
        for k, (name, state) in enumerate(zip(names, states, strict=True))
    ]
    text = "; ".join(plan_checkpoints(recipe("task_arithmetic", folders)).problems)
    assert re.search(said, text), text
    assert len(text) < 1500


def test_what_is_said_of_many_state_dicts() -> None:
    base, *models = family(MANY, dtype=torch.float32)
    for state in models[1:]:
        state[NORM].fill_(torch.nan)
    said = r"models\[1\]: 16, models\[2\]: 16, models\[3\]: 16, models\[4\]: 16 and 35 others"
    with pytest.raises(MergeError, match=said):
        pymerge.merge(models, base, method="ties", density=0.5)


@pytest.mark.parametrize("what", ["weights", "grams", "outputs", "fishers"])
def test_what_is_said_of_many_models_of_a_layer(what: str) -> None:
    good, bad = torch.eye(2), torch.full((2, 2), torch.nan)
    many = [good, *[bad] * (MANY - 1)]
    plain = [good] * MANY
    with pytest.warns(UserWarning) as warned:
        if what == "fishers":
            pymerge.weighted_average(plain, many)
        else:
            pymerge.mats(
                many if what == "weights" else plain,
                many if what == "grams" else plain,
                output_grams=many if what == "outputs" else None,
            )
    text = str(warned[0].message)
    assert "and 35 others: NaN or infinity" in text
    assert len(text) < 600
