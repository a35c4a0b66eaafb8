"""Keys of recipes in the wild that mergekit passes over in silence: a note, and the same recipe as
without them.
"""

from __future__ import annotations

from typing import Any

import pytest

from pymerge.errors import ConfigError
from pymerge.recipe.ignored import OPTIONS_OF_THE_COMMAND
from pymerge.recipe.schema import read_config
from pymerge.recipe.yaml import read_yaml

PLAIN: dict[str, Any] = {
    "merge_method": "slerp",
    "base_model": "/models/a",
    "models": [{"model": "/models/a"}, {"model": "/models/b"}],
    "parameters": {"t": 0.5},
}
TIES = """
merge_method: ties
base_model: base
models:
- {model: a, parameters: {weight: 1}}
"""


def noted(config: Any) -> list[str]:
    """The notes on a recipe that is the plain one otherwise."""
    checked, _, notes = read_config(config)
    expected, _, none = read_config(PLAIN)
    assert not none
    without = {"parameters": {"t": 0.5}}
    assert checked.model_copy(update=without) == expected.model_copy(update=without)
    return notes


def test_what_mergekit_passes_over_is_noted() -> None:
    entries = [{"model": "/models/a", "layer_range": [0, 32]}, {"model": "/models/b", "weight": 1}]
    config = PLAIN | {
        "name": "one",
        "models": entries,
        "parameters": {"t": 0.5, "embed_slerp": True, "random_seed": 1},
        "random_seed": 0,
        "seed": 3,
        "trust_remote_code": True,
        "normalize": True,
    }
    notes = noted(config)
    expected = (
        "name has no effect in a recipe of its own",
        "layer_range has no effect in models",
        "embed_slerp has no effect with merge_method slerp",
        "random_seed has no effect in a recipe; it is an option of the command, --random-seed",
        "seed has no effect in a recipe; it is an option of the command, --random-seed",
        "trust_remote_code has no effect in a recipe",
        "normalize has no effect here; it is read in `parameters` alone",
        "weight has no effect here; it is read in `parameters` alone",
    )
    for text in expected:
        assert any(f": {text}" in note for note in notes), text
    assert len(notes) == len(expected) + 1  # random_seed is there twice


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("modules: {default: {density: 0.5, models: [{model: a, parameters: {weight: 1}}]}}", 4),
        (
            "slices:\n- density: 0.5\n  sources:\n  - {model: base, layer_range: [0, 1]}\n"
            "  - {model: a, layer_range: [0, 1], parameters: {weight: 1}}",
            5,
        ),
        (
            "slices:\n- sources:\n  - {model: base, layer_range: [0, 1], density: 1}\n"
            "  - {model: a, layer_range: [0, 1], parameters: {weight: 1}}",
            6,
        ),
    ],
)
def test_a_misplaced_parameter_is_noted_at_every_level(
    place: str, text: int, tmp_path: Any
) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(f"\n{TIES[1:].split('models')[0]}{place}\n")
    _, _, notes = read_config(path)
    assert notes == [
        f"{path}, line {text}: density has no effect here; it is read in `parameters` alone"
    ]


def test_what_is_nobodys_stays_an_error() -> None:
    for more, said in (
        ({"random_sed": 0}, "unknown key 'random_sed'"),
        ({"models": [*PLAIN["models"], {"model": "/c", "layer_rage": 1}]}, r"'models\[2\].layer_rage'"),
        ({"flavor": "paper"}, "unknown key 'flavor'; it is a parameter, so write it in"),
        ({"parameters": {"t": 0.5, "sead": 1}}, "unknown parameter 'sead'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            read_config(PLAIN | more)


@pytest.mark.parametrize("key", ["x-models", "x_models", ".models", "_models"])
def test_keys_that_hold_anchors_may_be_called_as_extensions_are(key: str, tmp_path: Any) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(f"{key}: &usual {{weight: 1}}\n{TIES.replace('{weight: 1}', '*usual')}")
    config, _, notes = read_config(path)
    assert config.models is not None and config.models[0].parameters == {"weight": 1} and not notes
    path.write_text(f"{key}: {{weight: 1}}\n{TIES}")
    with pytest.raises(ConfigError, match="unknown key"):
        read_config(path)
    assert key not in read_yaml(path.read_text(), "recipe.yml").shared


def test_options_in_recipes_are_options_of_the_command() -> None:
    from pymerge.cli.main import mergekit_yaml

    options = {option for parameter in mergekit_yaml.params for option in parameter.opts}
    assert {f"--{name.replace('_', '-')}" for name in OPTIONS_OF_THE_COMMAND} <= options
