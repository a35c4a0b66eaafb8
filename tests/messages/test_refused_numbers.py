"""A refused number is shown as it is: rounded to a few digits it may look allowed."""

from __future__ import annotations

import math

import pytest
import torch

import pymerge
from pymerge.compat import mergekit, ties_merging
from pymerge.errors import ConfigError
from pymerge.messages.words import exact

ONE = torch.ones(3)
SQUARE = torch.eye(3)
STATE = {"w": ONE}


@pytest.mark.parametrize(
    "number, text",
    [(1.0000001, "1.0000001"), (20, "20"), (0.1, "0.1"), (-0.0, "-0"), (1e22, "1e+22"),
     (math.nextafter(1, 2), "1.0000000000000002"), (math.inf, "inf"), (1234567.5, "1234567.5")],
)  # fmt: skip
def test_no_digit_is_rounded_away(number, text):
    assert exact(number) == text and float(text) == number


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: pymerge.ties([ONE], density=1.0000001), "density=1.0000001 is outside [0, 1]"),
        (lambda: pymerge.ties([ONE], density=-1e-12), "density=-1e-12 is outside [0, 1]"),
        (
            lambda: pymerge.ties([ONE] * 2, density=[0.5, 1.0000001]),
            "density[1]=1.0000001 is outside [0, 1]",
        ),
        (
            lambda: pymerge.ties([ONE], trim="outliers", gamma=1.0000001),
            "gamma=1.0000001 is outside [0, 1]",
        ),
        (
            lambda: pymerge.ties([ONE], density=99.99999999),
            "density=99.99999999 is outside [0, 1]; for 99.99999999% pass 0.9999999999",
        ),
        (lambda: pymerge.merge([STATE], STATE, density=1.0000001), "density=1.0000001 is outside"),
        (
            lambda: pymerge.mats([SQUARE], [SQUARE], off_diagonal=1.0000001),
            "off_diagonal=1.0000001 is outside [0, 1]",
        ),
        (
            lambda: pymerge.mats([SQUARE], [SQUARE], damping=-1.23456789e-9),
            "damping=-1.23456789e-09 is negative",
        ),
        (
            lambda: pymerge.mats([SQUARE], [SQUARE], step_limit=-0.12345678901),
            "step_limit=-0.12345678901 is not positive",
        ),
        (
            lambda: pymerge.mats([SQUARE], [SQUARE], task_weights=[1000000000000.5]),
            "task_weights[0]=1000000000000.5 is outside",
        ),
        (
            lambda: pymerge.weighted_average([ONE], [ONE], minimum=-1.00000001),
            "minimum=-1.00000001 is negative",
        ),
        (
            lambda: ties_merging.topk_values_mask(ONE, 100.0000001),
            "K=100.0000001 is outside [0, 1]",
        ),
        (
            lambda: mergekit.merge_tensors(
                [ONE, ONE], "ties", base_index=0, parameters={"weight": 1, "density": 1.0000001}
            ),
            "density: 1.0000001 is outside [0, 1]",
        ),
    ],
)
def test_what_is_refused_is_shown_as_it_is(call, said):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(said)


def test_a_fraction_that_rounding_has_spoilt_is_not_taken_for_percent():
    with pytest.raises(ValueError, match=r"density=1.0000001 is outside \[0, 1\]$"):
        pymerge.ties([ONE], density=1.0000001)


@pytest.mark.parametrize(
    "parameters, said",
    [
        ({"density": 1.0000001}, r"density: 1.0000001 is outside \[0, 1\]$"),
        ({"density": 29}, r"density: 29 is outside \[0, 1\]; for 29% pass 0.29$"),
    ],
)
def test_recipes_too(tmp_path, parameters, said):
    models = [{"model": "a", "parameters": {"weight": 1, **parameters}}]
    with pytest.raises(ConfigError, match=said):
        pymerge.plan_checkpoints({"merge_method": "ties", "base_model": "b", "models": models})
