"""mergekit's YAML: what is read, and that every problem is named with its line, all at once."""

from __future__ import annotations

import enum
import random
import string
from collections import deque
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pymerge.errors import ConfigError, MergeError
from pymerge.recipe.model import TokenRow
from pymerge.recipe.resolve import read_recipe
from pymerge.recipe.schema import (
    ModelReference,
    check_config,
    parse_reference,
    read_config,
)
from pymerge.recipe.yaml import MAX_BYTES, MAX_DEPTH, read_yaml

GOOD = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 0.5, density: 0.2}
  - model: org/b@v2
    parameters: {weight: 0.5, density: [0.2, 1e-1]}
parameters:
  normalize: true
dtype: bfloat16
"""


def read(text):
    return check_config(read_yaml(text, "recipe.yml"), None)


def problems(text):
    with pytest.raises(ConfigError) as caught:
        read(text)
    return caught.value.problems


def only_problem(text):
    found = problems(text)
    assert len(found) == 1, found
    return found[0]


def test_good_file():
    config, _, notes = read(GOOD)
    assert config.models[1].model == ModelReference("org/b", "v2")
    assert config.base_model == ModelReference("base")
    assert config.dtype == "bfloat16"
    assert notes == []


def test_errors_are_merge_errors_and_value_errors():
    assert issubclass(ConfigError, MergeError) and issubclass(MergeError, ValueError)


def test_all_problems_at_once_in_the_order_of_lines():
    found = problems("""\
merge_method: ties
modells:
  - model: x
models:
  - model: a
    parameters:
      weight: heavy
      density: 20
  - model: b
    parametres: {}
base_model: base
dtype: bf16
parameters:
  normalise: true
  rescale: maybe
""")
    assert found == (
        "recipe.yml, line 2: unknown key 'modells'; did you mean 'models'?",
        "recipe.yml, line 7: weight: 'heavy' is not a number",
        "recipe.yml, line 8: density: 20 is outside [0, 1]; for 20% pass 0.2",
        (
            "recipe.yml, line 9: models[1]: weight is missing; set it here, or for all models in the"
            " top-level parameters"
        ),
        "recipe.yml, line 10: unknown key 'models[1].parametres'; did you mean 'parameters'?",
        (
            "recipe.yml, line 12: dtype: 'bf16' is not one of float32, float16, bfloat16, float64;"
            " did you mean 'bfloat16'?"
        ),
        "recipe.yml, line 14: unknown parameter 'normalise'; did you mean 'normalize'?",
        "recipe.yml, line 15: rescale: 'maybe' is text; pass true or false",
    )


# Of a method with statistics, a problem of another kind in each line: the recipe alone shows all.
LINES = {
    "init without a base": ("parameters: {init: ties}", ["init: ties needs base_model"]),
    "one of several inits": (
        "parameters: {init: [{filter: x, value: pretrained}, {value: zero}]}",
        ["init: pretrained needs base_model"],
    ),
    "init beside a wrong value": (
        "parameters: {init: task_arithmetic, lambda: x}",
        ["init: task_arithmetic needs base_model", "lambda: 'x' is not a number"],
    ),
    "init of no model": ("parameters: {init: a@b@c}", ["init: 'a@b@c' is neither one of average"]),
    "settings that do not go together": (
        "parameters: {task_weights: trace, weight: 2}",
        ["weight is given and task_weights is trace"],
    ),
    "weights of zero": ("parameters: {weight: 0}", ["the weights of all models are 0"]),
}


@pytest.mark.parametrize("case", LINES)
def test_what_values_come_to_is_told_with_everything_else(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").touch()
    line, words = LINES[case]
    found = problems(f"""\
merge_method: mats
models:
  - {{model: a, statistics: s}}
  - {{model: b, statistics: nope}}
dtype: int8
{line}
""")
    expected = [*words, "models[1].statistics: there is no file 'nope'", "dtype: 'int8' is not one"]
    assert len(found) == len(expected), found
    for each in expected:
        assert sum(each in problem for problem in found) == 1, found


def test_a_value_that_is_never_taken_is_no_problem(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").touch()
    read("""\
merge_method: mats
slices:
  - sources: [{model: a, statistics: s, layer_range: [0, 2]}]
    parameters: {init: zero}
parameters: {init: ties, weight: [0, 1]}
""")


def test_two_statistics_files_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("s", "t"):
        (tmp_path / name).touch()
    found = problems("""\
merge_method: regmean
slices:
  - sources: [{model: a, statistics: s, layer_range: [0, 1]}]
  - sources: [{model: a, statistics: ./s, layer_range: [1, 2]}]
  - sources: [{model: a, statistics: t, layer_range: [2, 3]}]
dtype: int8
""")
    assert len(found) == 2 and "slices[2].sources[0]: a has two statistics files, s in" in found[0]


def test_a_negative_range_is_told_once():
    found = only_problem("""\
merge_method: linear
slices:
  - sources: [{model: a, layer_range: [3, 2]}, {model: b, layer_range: [0, 2]}]
parameters: {weight: 1}
""")
    assert "layer_range: [3, 2] runs backwards or is negative" in found


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("merge_method: ties", "merge_method: tie", 1, "did you mean 'ties'"),
        (
            "merge_method: ties",
            "merge_method: slurp",
            1,
            "'slurp' is not one of linear, task_arithmetic,",
        ),
        ("merge_method: ties", "merge_method: [ties]", 1, "merge_method"),
        ("base_model: base\n", "", 2, "ties needs base_model"),
        (
            "base_model: base",
            "base_model: 3",
            2,
            "base_model: 3 is a number; pass a path or a hub id",
        ),
        ("base_model: base", "base_model: x+", 2, "is not base+adapter, two paths or hub ids"),
        (
            "base_model: base",
            "base_model: x+y+z",
            2,
            "more than one '+'; a model takes one adapter",
        ),
        ("base_model: base", "base_model: {model: x+y, lora: z}", 2, "has an adapter already"),
        ("base_model: base", "base_model: {model: x, lora: 3}", 2, "3 is a number; pass a path"),
        ("base_model: base", "base_model: a@b@c", 2, "more than one '@'"),
        ("models:", "slices: []\nmodells:", 4, "did you mean 'models'"),
        ("weight: 0.5, density: 0.2", "weight: .nan", 5, "nan is not finite"),
        ("weight: 0.5, density: 0.2", "weight: [0.5, {value: 1}]", 5, "stands among filters"),
        ("weight: 0.5, density: 0.2", "weight: {filter: x}", 5, "needs 'value'"),
        ("weight: 0.5, density: 0.2", "weight: {value: 1, fliter: x}", 5, "unknown key 'fliter'"),
        ("weight: 0.5, density: 0.2", "weight: []", 5, "empty list"),
        ("weight: 0.5, density: 0.2", "weight: null", 5, "weight: None is empty; pass a number"),
        ("weight: 0.5, density: 0.2", "weight: true", 5, "True is a truth value"),
        ("weight: 0.5, density: 0.2", "weight: 1, density: -0.1", 5, "-0.1 is outside [0, 1]"),
        (
            "weight: 0.5, density: 0.2",
            "weight: 1, density: [0.1, 1.5]",
            5,
            "density[1]: 1.5 is outside [0, 1]",
        ),
        ("weight: 0.5, density: 0.2", "density: 0.2", 4, "weight is missing"),
        ("model: org/b@v2", "model: a", 6, "a is there twice"),
        ("model: org/b@v2", "model: ''", 6, "pass a path or a hub id"),
        ("model: org/b@v2", "modl: x", 6, "models[1].model is missing"),
        ("normalize: true", "lamda: 1", 9, "did you mean 'lambda'"),
        ("normalize: true", "scales: 1", 9, "unknown parameter 'scales'"),
        ("dtype: bfloat16", "dtype: int8", 10, "is not one of float32"),
        ("dtype: bfloat16", "dtype: 16", 10, "16 is not one of"),
        ("dtype: bfloat16", "tokenizer: {tokens: {x: 1}}", 10, "tokenizer.tokens.x: 1 is a"),
        ("dtype: bfloat16", "tokenizer: {tokens: [x]}", 10, "tokens: ['x'] is a list"),
        ("dtype: bfloat16", "tokenizer: {tokens: {x: {sorce: a}}}", 10, "did you mean 'source'"),
        ("dtype: bfloat16", "tokenizer: {tokens: {x: {force: true}}}", 10, "force needs a source"),
        ("dtype: bfloat16", "tokenizer: {tokens: {x: {force: 1}}}", 10, "pass true or false"),
        (
            "dtype: bfloat16",
            "tokenizer: {tokens: {x: {source: {kind: one}}}}",
            10,
            "'one' is not one of zero, model_token",
        ),
        (
            "dtype: bfloat16",
            "tokenizer: {tokens: {x: {source: {kind: zero, model: a}}}}",
            10,
            "unknown key 'model'",
        ),
        (
            "dtype: bfloat16",
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
            10,
            "has either token or token_id",
        ),
        (
            "dtype: bfloat16",
            "tokenizer: {tokens: {x: {source: {kind: model_token, token: b, token_id: 1, model: a}}}}",
            10,
            "has either token or token_id",
        ),
        (
            "dtype: bfloat16",
            "tokenizer: {tokens: {x: {source: {kind: model_token, token_id: -1, model: a}}}}",
            10,
            "-1 is not a whole number from 0 on",
        ),
        (
            "dtype: bfloat16",
            "tokenizer: {tokens: {x: {source: {kind: model_token, token: b}}}}",
            10,
            "pass a path or a hub id",
        ),
        ("dtype: bfloat16", "chat_template: chatmll", 10, "is neither auto, nor one of alpaca"),
        ("dtype: bfloat16", "chat_template: [chatml]", 10, "is a list; pass text"),
        ("dtype: bfloat16", "parameters: {}", 10, "key 'parameters' is already on line 8"),
        (
            "dtype: bfloat16",
            "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]",
            10,
            "exactly one of models",
        ),
    ],
)
def test_one_problem(old, new, line, words):
    assert old in GOOD
    found = problems(GOOD.replace(old, new, 1))
    assert any(f"recipe.yml, line {line}: " in item and words in item for item in found), found


SLICES = """\
merge_method: passthrough
slices:
  - sources:
      - model: a
        layer_range: [0, 4]
  - sources:
      - model: b
        layer_range: [2, 6]
"""


def test_more_layers_than_there_can_be():
    """Said before there is anything of each of them: that would fill the memory, or never end."""
    for end in (100_001, 10**20):
        with pytest.raises(ConfigError) as caught:
            read_recipe(read_yaml(SLICES.replace("[0, 4]", f"[0, {end}]"), "f").data)
        (found,) = caught.value.problems
        assert f"the slices have {end + 4:,} layers, and no model has more than 100,000" in found


def test_slices():
    config, _, _ = read(SLICES)
    assert config.slices[1].sources[0].layer_range == (2, 6)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("[0, 4]", "[0, 4, 5]", 5, "is not [first, end)"),
        ("[0, 4]", "[4, 3]", 5, "runs backwards or is negative"),
        ("[0, 4]", "[-1, 4]", 5, "runs backwards or is negative"),
        ("[0, 4]", "all", 5, "is not [first, end)"),
        ("        layer_range: [0, 4]\n", "", 4, "layer_range is missing"),
        (
            "sources:\n      - model: a\n        layer_range: [0, 4]",
            "sources: []",
            3,
            "at least one entry",
        ),
        ("passthrough", "linear", 4, "weight is missing"),
        ("passthrough", "ties\nbase_model: c", 4, "the base model c is not among the sources"),
        (
            "[0, 4]",
            "[0, 4]\n      - model: b\n        layer_range: [0, 4]",
            3,
            "takes 1 model, not 2",
        ),
    ],
)
def test_one_problem_in_slices(old, new, line, words):
    found = problems(SLICES.replace(old, new, 1))
    assert any(f"recipe.yml, line {line}: " in item and words in item for item in found), found


def test_slices_of_unequal_length():
    text = SLICES.replace("passthrough", "linear").replace(
        "[0, 4]",
        "[0, 4]\n        parameters: {weight: 1}\n      - model: b\n        layer_range: [0, 3]",
    )
    assert any(
        "the same number of layers, not 4, 3" in item
        for item in problems(text + "parameters: {weight: 1}")
    )


def test_base_model_of_linear_is_an_input():
    text = "merge_method: linear\nbase_model: c\nmodels:\n- model: a\n  parameters: {weight: 1}\n"
    assert "line 2" in only_problem(text) and "one more input" in only_problem(text)
    read(text + "parameters: {weight: 1}")


def test_passthrough_with_a_base_model_has_two_inputs():
    assert "takes 1 model, not 2 (base_model is one of them)" in only_problem(
        "merge_method: passthrough\nbase_model: c\nmodels:\n- model: a\n"
    )


def test_modules():
    module = (
        "merge_method: linear\nmodules:\n  text:\n    models:\n    - {model: a, parameters:"
        " {weight: 1}}\n"
    )
    read(module)
    read(module + "  vision:\n    models:\n    - {model: a, parameters: {weight: 1}}\n")
    assert "needs exactly one of models and slices" in only_problem(
        "merge_method: linear\nmodules: {text: {}}"
    )


def test_notes_on_what_has_no_effect():
    _, _, notes = read(
        GOOD.replace("normalize: true", "epsilon: 0.1").replace("density: 0.2", "lambda: 2")
        + "slices:\n"
    )
    assert [note.split(": ", 1)[0] for note in notes] == [
        "recipe.yml, line 5",
        "recipe.yml, line 9",
    ]
    assert "lambda is one value for all models" in notes[0]
    assert "epsilon has no effect with merge_method ties" in notes[1]


def test_a_note_on_the_architecture_of_a_model_wherever_it_is_named():
    named = "{model: %s, override_architecture: LlamaForCausalLM}"
    _, _, notes = read(
        f"merge_method: ties\nbase_model: {named % 'c'}\nmodels:\n- model: {named % 'a'}\n"
        "  parameters: {weight: 1}\n- model: {model: b, override_architecture: null}\n"
        "  parameters: {weight: 1}\n"
    )
    assert [note.split(": ", 1)[0] for note in notes] == [
        "recipe.yml, line 2",
        "recipe.yml, line 4",
    ]
    assert all("override_architecture has no effect" in note for note in notes)


def test_tokenizers():
    assert read(GOOD + "tokenizer_source: base")[0].tokenizer_source == "base"
    assert read(GOOD + "tokenizer: {source: a}")[0].tokenizer.source == ModelReference("a")
    assert any(
        "keep one of the two" in p
        for p in problems(GOOD + "tokenizer: {source: a}\ntokenizer_source: a")
    )
    no_base = (
        "merge_method: linear\ntokenizer_source: base\nmodels:\n- {model: a, parameters: {weight:"
        " 1}}\n"
    )
    assert "'base' is the first model" in str(read(no_base)[2])
    for text in ("tokenizer_source: union", "tokenizer: {}", "tokenizer: {source: union}"):
        recipe = read_recipe(yaml.safe_load(GOOD + text))
        assert recipe.union and recipe.tokenizer == recipe.base


def test_rows_of_single_tokens():
    tokens = {
        "x": {"source": "a"},
        "y": {"source": {"kind": "zero"}, "force": True},
        "z": {"source": {"kind": "model_token", "model": "org/b@v2", "token": "<z>"}},
        "v": {"source": {"kind": "model_token", "model": {"model": {"path": "a"}}, "token_id": 0}},
        "w": None,
    }
    config = {**yaml.safe_load(GOOD), "tokenizer": {"source": "base", "tokens": tokens}}
    recipe = read_recipe(config)
    one, other = (recipe.models.index(name) for name in ("a", "org/b@v2"))
    assert recipe.tokens == (
        TokenRow("x", one),
        TokenRow("y", zero=True, force=True),
        TokenRow("z", other, "<z>"),
        TokenRow("v", one, 0),
        TokenRow("w"),
    )
    assert not recipe.union
    config["tokenizer"]["tokens"]["x"]["source"] = "elsewhere"
    with pytest.raises(ConfigError, match=r"tokens\['x'\]: its source elsewhere is none of the"):
        read_recipe(config)


def test_model_references(tmp_path):
    assert parse_reference({"model": {"path": "p", "revision": "r"}}) == ModelReference("p", "r")
    assert parse_reference({"model": "p@r"}) == ModelReference("p", "r")
    assert parse_reference(tmp_path) == ModelReference(str(tmp_path))
    (tmp_path / "a+b@c").mkdir()
    assert parse_reference("a+b@c", tmp_path) == ModelReference("a+b@c")
    adapted = ModelReference("p", "r", ModelReference("q", "s"))
    assert parse_reference("p@r+q@s") == adapted and str(adapted) == "p@r+q@s"
    lora = {"path": "q", "revision": "s"}
    assert parse_reference({"model": {"path": "p", "revision": "r"}, "lora": lora}) == adapted
    on_plus = ModelReference("a+b@c", adapter=ModelReference("q"))
    assert parse_reference("a+b@c+q", tmp_path) == on_plus
    assert parse_reference("q+a+b@c", tmp_path) == ModelReference(
        "q", adapter=ModelReference("a+b@c")
    )
    for bad in (
        "+".join("abcdefghijklmnopqrstuvw"),
        {"model": {"path": 3}},
        {"modle": "x"},
        {"model": {"path": "x", "rev": "y"}},
        {},
        "@x",
        "x@",
        "\0+",
    ):
        with pytest.raises(ValueError):
            parse_reference(bad)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("just text", "is text, not a mapping"),
        ("- a", "is a list, not a mapping"),
        ("a: b: c", "line 1, column 5 is not YAML"),
        ("a: [1, 2", "is not YAML"),
        ("a:\n\t- b", "line 2, column 1 is not YAML: a tab, which indents nothing"),
        ("a:\n  b:\n\t    c: 1", "line 3, column 1 is not YAML: a tab, which indents nothing"),
        ("a: 1\n\tb: 2", "line 2"),
        ("a: 1\n---\nb: 2", "line 3: a second YAML document begins here, and a recipe is one"),
        (
            "a: !!python/object:os.system x",
            "tag 'tag:yaml.org,2002:python/object:os.system' is not allowed",
        ),
        ("a: !!set {x, y}", "is not allowed"),
        ("a: !!int ''", "is not a valid int"),
        ("a: " + "9" * 5000, "is not a valid int"),
        ("a: " + ":".join(["1"] * 5000), "is not a valid int"),
        ("a: &x [*x]", "aliases nest deeper"),
        ("a: &x {<<: *x}", "aliases nest deeper"),
        ("? [a, b]\n: 1", "a key must be text"),
        ("[" * 100, "nested deeper than"),
        ("a: *nothing", "is not YAML"),
        ("a: 1\na: 2", "line 2: key 'a' is already on line 1"),
        ("x: " + "y" * MAX_BYTES, "a configuration has at most"),
        ("a: '\x00'", "is not YAML"),
    ],
)
def test_yaml_problems(text, words):
    assert any(words in item for item in problems(text)), problems(text)


def test_deep_nesting_says_so_once():
    assert only_problem("[" * 100) == "recipe.yml, line 1: nested deeper than 32 levels"


def test_a_file_that_is_no_recipe_lists_a_hundred_problems():
    found = problems("".join(f"k{i}: 1\n" for i in range(500)))
    assert len(found) == 101 and found[-1] == "and 402 more"


def test_alias_bomb():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "aliases expanded" in only_problem("\n".join(lines))


def test_merge_keys_and_anchors():
    document = read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [*a, {z: 4}]}", "f")
    assert document.data["b"] == {"x": 1, "y": 3}
    assert document.data["c"] == {"x": 1, "y": 2, "z": 4}


@pytest.mark.parametrize(
    ("key", "used"),
    [
        ("common: &c {weight: 0.5, density: 0.2}", "*c"),
        ("common: &c {weight: 0.5, density: 0.2}", "{<<: *c, weight: 0.7}"),
        ("_: [1, &c {weight: 0.5, density: 0.2}]", "*c"),
        ("numbers: {half: &c 0.5}", "{weight: *c, density: *c}"),
    ],
)
def test_a_key_of_the_top_level_may_hold_what_aliases_stand_for(key, used):
    models = f"models:\n- {{model: a, parameters: {used}}}\n- {{model: b, parameters: {used}}}\n"
    config, document, notes = read(f"{key}\nmerge_method: ties\nbase_model: base\n{models}")
    assert [set(m.parameters) for m in config.models] == [{"weight", "density"}] * 2 and not notes
    assert set(document.data) == {"merge_method", "base_model", "models"}


def test_a_key_that_no_alias_needs_is_still_unknown():
    assert "unknown key 'common'" in only_problem("common: {weight: 1}\n" + GOOD)
    assert "unknown key 'common'" in only_problem("common: &c {weight: 1}\n" + GOOD)
    # Nor does an anchor make a misspelt key a right one.
    text = GOOD.replace("base_model: base", "base_modl: &b base").replace("model: a", "model: *b")
    assert any("did you mean 'base_model'?" in each for each in problems(text))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("TIES", "ties"), ("dare-ties", "dare_ties"), ("Task Arithmetic", "task_arithmetic")],
)
def test_a_method_in_other_letters_gets_a_hint(name, meant):
    text = GOOD.replace("merge_method: ties", f"merge_method: {name}")
    assert any(f"did you mean {meant!r}?" in each for each in problems(text))


def test_scalars_are_yaml_1_1():
    data = read_yaml("{a: 1e-3, b: 0x10, c: off, d: ~, e: 2024-01-01, f: 1.5e+3}", "f").data
    assert data == {"a": "1e-3", "b": 16, "c": False, "d": None, "e": "2024-01-01", "f": 1500.0}


@pytest.mark.parametrize("given", [None, ["base", "m1"], b"recipe.yml", 3])
def test_what_is_no_configuration(given):
    with pytest.raises(
        TypeError, match=r"^config is an? \w+; pass the path of a YAML file, or a map"
    ):
        read_config(given)


def test_the_text_of_a_recipe_is_no_path():
    with pytest.raises(ConfigError, match=r"text of several lines.* pass yaml\.safe_load of it"):
        read_config(GOOD)


def test_numbers_and_arrays_of_numpy_are_numbers():
    """As loops over settings make them."""
    model = {
        "model": "a",
        "parameters": {"weight": np.float32(0.5), "density": np.array([0.25, 1])},
    }
    config = {"merge_method": "ties", "base_model": "b", "models": [model]}
    text = read_recipe(config).text
    model["parameters"] = {"weight": 0.5, "density": [0.25, 1.0]}
    assert text == read_recipe(config).text
    model["parameters"] = {"weight": 0.5, "density": np.array([])}
    with pytest.raises(ConfigError, match="an empty list has no value"):
        read_recipe(config)


class Method(str, enum.Enum):
    ties = "ties"


def test_other_numbers_and_texts_of_python_are_plain_ones():
    """Which the recipe in the model card can hold."""
    config = {"merge_method": Method.ties, "base_model": np.str_("b")}
    config["models"] = ({"model": "a", "parameters": {"weight": Fraction(1, 2)}},)
    config["parameters"] = {"density": Decimal("0.25"), "lambda": torch.tensor(2.0)}
    text = read_recipe(config).text
    config = {"merge_method": "ties", "base_model": "b"}
    config["models"] = [{"model": "a", "parameters": {"weight": 0.5}}]
    config["parameters"] = {"density": 0.25, "lambda": 2.0}
    assert text == read_recipe(config).text


@pytest.mark.parametrize(
    "value",
    [
        (each for each in [{"model": "a"}]),
        {"a"},
        object(),
        b"a",
        deque(["a"]),
        1j,
        range,
        np.float64,
        torch.empty(2, device="meta"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("place", ["models", "parameters", "seed"])
def test_what_no_yaml_file_could_hold(place, value):
    config = {"merge_method": "linear", "models": [{"model": "a"}], place: value}
    with pytest.raises(ConfigError, match=rf"configuration: {place}: .* is .*; pass text, a numb"):
        read_config(config)
    with pytest.raises(ConfigError, match=r"configuration: models\[0\]\.parameters\.weight: "):
        read_config(
            {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": value}}]}
        )


def test_not_utf8_and_missing_files(tmp_path):
    path = tmp_path / "x.yml"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_config(path)
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_config(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_config(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    read_config(path)
    path.write_bytes(b"a" * (MAX_BYTES + 10))
    with pytest.raises(ConfigError, match="at most"):
        read_config(str(path))


def test_mappings(tmp_path):
    config, _, _ = read_config(
        {"merge_method": "linear", "models": ({"model": tmp_path, "parameters": {"weight": 1}},)}
    )
    assert config.models[0].model.path == str(tmp_path)
    with pytest.raises(ConfigError, match="configuration: key 1"):
        read_config({"merge_method": "linear", 1: 2})


def accepts_or_refuses(text):
    """The only exception for any bytes is ConfigError."""
    try:
        read(text)
    except ConfigError as error:
        assert error.problems and all(isinstance(item, str) and item for item in error.problems)


WORDS = [
    "merge_method",
    "models",
    "slices",
    "sources",
    "model",
    "parameters",
    "weight",
    "density",
    "layer_range",
]
WORDS += [
    "base_model",
    "ties",
    "linear",
    "value",
    "filter",
    "tokenizer",
    "modules",
    "dtype",
    "<<",
    "normalize",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(WORDS),
)
DATA = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), inner, max_size=5),
    ),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300))
def test_fuzz_bytes(data):
    accepts_or_refuses(data)


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="abc:-[]{}&*!|>'\"#%@`,?<0123456789.e+~ \n\t\\", max_size=200))
def test_fuzz_syntax(text):
    accepts_or_refuses(text)


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS), DATA, max_size=6))
def test_fuzz_structure(data):
    try:
        read_config(data)
    except ConfigError as error:
        assert error.problems


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_fuzz_mutations(seed):
    draw = random.Random(seed)
    text = list(draw.choice([GOOD, SLICES]))
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(text))
        text[place : place + draw.randint(0, 3)] = draw.choice(
            ["", " ", "\n", draw.choice(string.printable), "- ", "*a", "&a "]
        )
    accepts_or_refuses("".join(text))


@settings(max_examples=50, deadline=None)
@given(st.integers(MAX_DEPTH - 3, 3000), st.sampled_from(["[", "{a: ", "- ", "? "]))
def test_fuzz_depth(depth, opening):
    accepts_or_refuses(opening * depth)


def test_a_single_line_is_told_by_its_columns(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(
        '{"merge_method": "linear", "models": [{"model": ".", "weigth": 1}], "dtyp": 1}'
    )
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    text = str(caught.value)
    assert "recipe.json, line 1, column 54: unknown key 'models[0].weigth'" in text
    assert "recipe.json, line 1, column 69: unknown key 'dtyp'" in text


def test_merge_keys_that_multiply() -> None:
    lines = ["a: &a0 {}"]
    for i in range(1, 4):
        lines.append(f"b{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 20)}]}}")
    inner = "{<<: [" + ",".join(["*a3"] * 20) + "]}"
    for k in range(6):
        inner = f"{{<<: [&n{k} {inner}," + ",".join([f"*n{k}"] * 20) + "]}"
    with pytest.raises(ConfigError, match="more than 50000 entries"):
        read_yaml("\n".join([*lines, f"last: {inner}\n"]), "bomb.yml")


def test_a_revision_is_one_of_the_hubs(tmp_path: Path) -> None:
    """mergekit takes the folder whatever its revision; so do recipes here, and say it."""
    (tmp_path / "m").mkdir()
    named = [
        {"model": {"path": "m", "revision": "main"}},
        "m@main",
        {"model": "m@main"},
        {"model": {"path": "m"}, "lora": {"path": "m", "revision": "main"}},
    ]
    for raw in named:
        found = parse_reference(raw, tmp_path)
        assert found.path == "m" and found.revision is None
        assert found.adapter is None or found.adapter == ModelReference("m")
        path = tmp_path / "recipe.yml"
        recipe = {"merge_method": "linear", "models": [{"model": raw, "parameters": {"weight": 1}}]}
        path.write_text(yaml.safe_dump(recipe))
        (note,) = read_config(path)[2]
        assert note.endswith("the revision of m has no effect: it is a path here")
    assert parse_reference("n@main", tmp_path) == ModelReference("n", "main")


def test_the_name_of_a_recipe_of_its_own_is_noted(tmp_path: Path) -> None:
    """mergekit-multi gives one to all recipes of a file but the last."""
    recipe = {
        "name": "mine",
        "merge_method": "linear",
        "models": [{"model": "m", "parameters": {"weight": 1}}],
    }
    (note,) = read_config(recipe)[2]
    assert note.endswith("name has no effect in a recipe of its own")
