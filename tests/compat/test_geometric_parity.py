"""slerp, nuslerp, multislerp, karcher and model_stock beside mergekit's own functions, on drawn
inputs.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from pymerge.compat import mergekit as compat

pytestmark = pytest.mark.parity
pytest.importorskip("mergekit", reason="mergekit is not installed")

SHAPES = {"matrix": (33, 65), "bias": (77,), "one": (1,), "filters": (5, 3, 2, 2), "row": (1, 40)}


def family(count, dtype, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    models = [
        {n: x + spread * torch.randn(x.shape, generator=generator) for n, x in base.items()}
        for _ in range(count)
    ]
    return [{n: x.to(dtype) for n, x in state.items()} for state in (base, *models)]


def both(states, method, parameters, base):
    from mergekit.merge_methods import merge_state_dicts

    options = {"parameters": parameters, "base": 0 if base else None}
    given = states if base else states[1:]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*mergekit")
        ours = compat.merge_state_dicts(given, method, **options)
    # mergekit computes in the models' dtype: beside it stands what it answers in float32.
    wide = [{n: x.float() for n, x in state.items()} for state in given]
    return ours, merge_state_dicts(wide, method, **options)


def agree(ours, theirs, dtype):
    assert set(ours) == set(theirs)
    allowed = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for name, want in theirs.items():
        assert ours[name].dtype == dtype and ours[name].shape == want.shape
        off = (ours[name].double() - want.double()).norm() / want.double().norm()
        assert off <= allowed, (name, float(off))


CASES = [
    ("slerp", {"t": 0.35}, True, 1),
    ("slerp", {"t": 0.0}, True, 1),
    ("slerp", {"t": 1.0}, True, 1),
    ("slerp", {"t": 1.4}, True, 1),
    ("nuslerp", {"weight": [0.6, 0.4]}, False, 2),
    ("nuslerp", {"weight": [1.0, -1.0]}, True, 2),
    ("nuslerp", {"weight": [2.0, -0.5]}, True, 2),
    ("nuslerp", {"weight": [0.6, 0.4], "nuslerp_flatten": False}, True, 2),
    ("nuslerp", {"weight": [0.6, 0.4], "nuslerp_flatten": False}, False, 2),
    (
        "nuslerp",
        {"weight": [0.6, 0.4], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        True,
        2,
    ),
    ("nuslerp", {"weight": [0.6, 0.4], "nuslerp_row_wise": True}, True, 2),
    ("multislerp", {"weight": [0.5, 0.3, 0.7]}, False, 3),
    ("multislerp", {"weight": [0.5, 0.3, 0.7]}, True, 3),
    ("multislerp", {"weight": [0.5, -0.1, 0.7], "normalize_weights": False}, True, 3),
    ("multislerp", {"weight": [0.5, 0.5], "eps": 1e-3}, True, 2),
    ("multislerp", {"weight": [0.8]}, True, 1),
    ("karcher", {}, False, 3),
    ("karcher", {"max_iter": 0}, False, 3),
    ("karcher", {"max_iter": 3, "tol": 1e-3}, False, 5),
    ("model_stock", {}, True, 2),
    ("model_stock", {}, True, 4),
    ("model_stock", {"filter_wise": True}, True, 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.1, 1.0])
@pytest.mark.parametrize(("method", "parameters", "base", "count"), CASES)
def test_drawn_cases(method, parameters, base, count, spread, dtype):
    states = family(count, dtype, spread)
    if base and method == "nuslerp" and parameters.get("nuslerp_row_wise"):
        # One element has the angle 0 or pi, and opposite ones are mended (G7).
        for state in states:
            del state["one"], state["row"]
            if not parameters.get("nuslerp_flatten", True):
                state.pop("bias")
    if parameters.get("nuslerp_flatten") is False:
        for state in states:  # rows of two elements are opposite now and then
            del state["filters"]
    if method in ("nuslerp", "model_stock") and base:
        for state in states:
            state.pop("one", None)
    agree(*both(states, method, parameters, base), dtype)


def test_zeros():
    """Numbers that mergekit decides otherwise than the papers are followed here."""
    states = family(2, torch.float32, 0.5)
    states[1] = {n: torch.zeros_like(x) for n, x in states[1].items()}
    agree(*both(states[:2], "slerp", {"t": 0.3}, True), torch.float32)
    agree(*both(states, "nuslerp", {"weight": [0.6, 0.4]}, False), torch.float32)
    agree(*both(states, "karcher", {}, False), torch.float32)
    agree(*both(states, "multislerp", {"weight": [0.6, 0.4]}, False), torch.float32)
    for name in ("slerp", "nuslerp"):
        parameters = {"t": 0.3} if name == "slerp" else {"weight": [0.6, 0.4]}
        given, base = (states[:2], 0) if name == "slerp" else (states[1:], None)
        with pytest.warns(UserWarning, match=f"{name}.* mergekit"):
            compat.merge_state_dicts(given, name, parameters=parameters, base=base)


def test_small_task_vectors_of_model_stock():
    states = family(3, torch.float32, 1e-5)
    agree(*both(states, "model_stock", {}, True), torch.float32)
    with pytest.warns(UserWarning, match="model_stock has mergekit's ratio"):
        compat.merge_state_dicts(states, "model_stock", base=0)


def test_what_mergekit_breaks_is_mended():
    """Unchanged and opposite tensors, which are NaN, noise or an error there."""
    states = family(3, torch.float32, 0.5)
    base, model = states[0], states[1]
    opposite = {n: 2 * base[n] - x for n, x in model.items()}
    for given, method in (
        ([base, base, base, base], "multislerp"),
        ([base, model, opposite], "multislerp"),
        ([base, model, opposite], "nuslerp"),
    ):
        made = compat.merge_state_dicts(
            given, method, parameters={"weight": [1.0] * (len(given) - 1)}, base=0
        )
        for name, want in base.items():
            torch.testing.assert_close(made[name], want, rtol=1e-5, atol=1e-5)
    flipped = {n: -x for n, x in model.items()}
    made = compat.merge_state_dicts([model, flipped], "karcher")
    for name, tensor in made.items():
        assert tensor.isfinite().all()
        assert math.isclose(tensor.norm(), model[name].norm(), rel_tol=1e-5)
