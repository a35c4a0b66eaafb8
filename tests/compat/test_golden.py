"""mergekit's own answers for every method that is not options of `ties`: each configuration of
tests/golden/mergekit runs as a merge of folders and agrees to 1e-6.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from folder_cases import read_result
from safetensors.torch import load_file

import pymerge
from pymerge.engine.merge import merge_checkpoints
from pymerge.methods import METHODS

GOLDEN = Path(__file__).parents[1] / "golden/mergekit"
PATHS = [
    path
    for path in sorted(GOLDEN.glob("*.yml"))
    if METHODS[path.read_text().split()[1]].op != "ties"
]


def agree(result, expected):
    assert set(result) == set(expected)
    for name, want in expected.items():
        got = result[name]
        assert got.dtype == want.dtype and got.shape == want.shape
        off = (got.double() - want.double()).norm() / want.double().norm()
        assert off <= 1e-6, (name, float(off))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_golden(path, tmp_path):
    merge_checkpoints(str(path), tmp_path / "out")
    agree(read_result(tmp_path / "out"), load_file(GOLDEN / f"expected_{path.stem}.safetensors"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:.*mergekit")
def test_golden_by_mergekits_function(path):
    """The same through `compat.mergekit`, whose numbers are those of recipes."""
    config = yaml.safe_load(path.read_text())
    names = [entry["model"] for entry in config["models"]]
    base = config.get("base_model")
    if base is not None and base not in names:
        names.append(base)
    parameters = dict(config.get("parameters", {}))
    for entry in config["models"]:
        for name, value in entry["parameters"].items():
            parameters.setdefault(name, {})[entry["model"]] = value
    models = {name: load_file(GOLDEN / name) for name in names}
    made = pymerge.compat.mergekit.merge_state_dicts(
        models, config["merge_method"], parameters=parameters, base=base
    )
    agree(made, load_file(GOLDEN / f"expected_{path.stem}.safetensors"))
