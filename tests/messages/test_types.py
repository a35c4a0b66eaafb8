"""The public functions as type checkers, editors and help() see them, and that types and tables
name the same words.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import pymerge
from pymerge.backends import registry
from pymerge.engine import state_dict_statistics, state_dicts
from pymerge.methods import METHODS
from pymerge.rules import masked, ties, types
from pymerge.rules import mats as _mats_rule
from pymerge.statistics import _file, _loss, _models

ROOT = Path(__file__).parents[2]


def test_mypy_accepts_the_right_uses_and_no_wrong_one():
    pytest.importorskip("mypy", reason="make lint installs mypy")
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml"]
    result = subprocess.run(
        [*command, "tests/typed_uses.py"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr


def words(literal: Any) -> list[str]:
    return list(get_args(literal))


@pytest.mark.parametrize(
    "literal, table",
    [
        (types.Flavor, ties.FLAVORS),
        (types.Backend, ["auto", *registry.TABLE["ties"]]),
        (types.TiesMethod, [name for name, m in METHODS.items() if m.op == "ties"]),
        (types.MaskedMethod, [name for name, m in METHODS.items() if m.op == "masked"]),
        (types.MaskedFlavor, masked.FLAVORS),
        (
            types.OpMethod,
            [name for name, m in METHODS.items() if m.op not in ("ties", "statistics")],
        ),
        (types.StatisticsMethod, [name for name, m in METHODS.items() if m.statistics]),
        (types.Task, _models._CLASSES),
    ],
    ids=[
        "flavor",
        "backend",
        "method",
        "method under masks",
        "its flavor",
        "method of an op",
        "method by statistics",
        "task",
    ],
)
def test_words_are_those_of_the_table(literal, table):
    assert sorted(words(literal)) == sorted(table)


def test_every_word_is_taken():
    """Not only listed: each gets through the checks of the function that takes it."""
    for option, literal in (
        ("flavor", types.Flavor),
        ("trim", types.Trim),
        ("elect", types.Elect),
        ("merge", types.Merge),
        ("zero_sign", types.ZeroSign),
        ("scope", types.Scope),
        ("rescale", types.Rescale),
        ("non_finite", types.NonFinite),
    ):
        for word in words(literal):
            assert getattr(ties.resolve_options(2, **{option: word}), option) == word
        with pytest.raises(ValueError, match=f"{option}='no' is not one of '{words(literal)[0]}'"):
            ties.resolve_options(2, **{option: "no"})
    for option, literal in (
        ("flavor", types.MatsFlavor),
        ("solver", types.Solver),
        ("task_weights", types.TaskWeights),
        ("precision", types.Precision),
    ):
        for word in words(literal):
            _mats_rule.resolve(2, **{option: word})
    for task in words(types.Task):
        assert callable(_loss.named_loss(task))
    assert set(words(types.PackedKind)) < set(words(types.Kind)) == set(_file.KINDS)


def keywords(function: Any) -> dict[str, Any]:
    """Keyword-only parameters and their defaults, `**` left out."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def test_ties_has_the_options_that_its_check_knows_with_their_defaults():
    taken = keywords(pymerge.ties)
    assert [taken.pop(name) for name in ("name", "backend", "out")] == ["", "auto", None]
    assert taken == keywords(ties.resolve_options)


def test_typed_keywords_are_those_that_are_taken():
    mats = {*_mats_rule.OPTIONS, "backend"}
    assert set(types.MatsKeywords.__annotations__) == mats
    statistics = mats | {"minimum"}
    assert set(types.StatisticsKeywords.__annotations__) == statistics
    elementwise = {
        word
        for method in METHODS.values()
        if not method.statistics
        for p in method.parameters
        if p.option
        for word in ((p.name,) if p.kind == "flag" else (p.name, p.option))
    }
    # `lambda` is Python's own word; `scaling` says the same.
    expected = {*elementwise, *state_dicts._COMMON, "elect"} - {"lambda"}
    expected |= statistics | set(keywords(state_dict_statistics.merge_with_statistics))
    assert set(state_dicts.MergeKeywords.__annotations__) == expected


def test_type_checkers_are_shown_what_is_there():
    tree = ast.parse((ROOT / "pymerge" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    shown = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    there = {name: f"{module}.{name}" for name, module in pymerge._PUBLIC.items()}
    there |= {name: f"pymerge.{name}" for name in pymerge._SUBMODULES}
    assert shown == there
    assert sorted(pymerge.__all__) == sorted(["__version__", *pymerge._PUBLIC])
    assert set(shown) <= set(dir(pymerge))


@pytest.mark.parametrize("name", pymerge._SUBMODULES)
def test_submodules_need_no_import_of_their_own(name):
    code = f"import sys, pymerge; print('torch' in sys.modules, pymerge.{name}.__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["False", f"pymerge.{name}"], result.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pymerge' has no attribute 'tise'"):
        pymerge.tise  # noqa: B018


@pytest.mark.parametrize("name", sorted(pymerge._PUBLIC))
def test_annotations_can_be_read_at_run_time(name):
    public = getattr(pymerge, name)
    assert public.__doc__ and (inspect.isclass(public) or "return" in get_type_hints(public))
