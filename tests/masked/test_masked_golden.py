"""Configurations of mergekit under masks and what it made of them (tests/golden/masked, on the models of
tests/golden/mergekit), in fp32.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from folder_cases import read_result
from safetensors.torch import load_file

from pymerge.engine.merge import merge_checkpoints

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = ("arcee_fusion", "nearswap", "ram", "ramplus_tl", "sce")


@pytest.mark.parametrize("run", RUNS)
def test_golden(run, tmp_path):
    config = yaml.safe_load((GOLDEN / "masked" / f"{run}.yml").read_text())
    for model in config["models"]:
        model["model"] = str(GOLDEN / "mergekit" / model["model"])
    config["base_model"] = str(GOLDEN / "mergekit" / config["base_model"])
    merge_checkpoints(config, tmp_path / "out")
    result = read_result(tmp_path / "out")
    expected = load_file(GOLDEN / "masked" / f"expected_{run}.safetensors")
    assert set(result) == set(expected)
    for name, tensor in expected.items():
        error = (result[name] - tensor).abs().max()
        assert error <= 1e-6 * tensor.abs().max(), name


def test_golden_covers_the_files():
    files = {path.stem for path in (GOLDEN / "masked").iterdir()}
    assert files == {*RUNS, *(f"expected_{run}" for run in RUNS)}
