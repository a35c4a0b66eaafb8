"""N4: fp16 results that are not finite though the models are."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

import pymerge
from pymerge.compat import mergekit, peft, ties_merging
from pymerge.engine.state_dict_statistics import merge_with_statistics
from pymerge.ops.ties import overflow

LARGE = torch.tensor([60000.0, 1.0, -60000.0]).half()
SUM = {"merge": "sum", "elect": "none", "density": 1.0}


def added(**options: object) -> torch.Tensor:
    return pymerge.ties([LARGE, LARGE], **SUM, **options)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_an_overflow_is_an_error_that_counts_and_says_the_way_out(backend):
    message = r"^2 values of the result overflow float16.*bfloat16, float32.*non_finite='allow'"
    with pytest.raises(ValueError, match=message):
        added(backend=backend)
    with pytest.raises(ValueError, match="2 values"):
        added(backend=backend, out=torch.empty(3, dtype=torch.float16))
    wide = added(backend=backend, out=torch.empty(3))
    assert wide.tolist() == [120000, 2, -120000]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_let_through_is_warned_of_once(backend):
    with pytest.warns(UserWarning, match="^2 values of the result overflow float16") as caught:
        result = added(backend=backend, non_finite="allow")
    assert result.tolist() == [math.inf, 2, -math.inf]
    (warning,) = caught
    assert "allow" not in str(warning.message) and warning.filename == __file__


@pytest.mark.parametrize("count", [1, 3, 6])
def test_state_dicts_are_counted_as_a_whole(count):
    state = {f"t{i}": LARGE[: i % 3 + 1] for i in range(count)}
    state |= {
        "wide": LARGE.float(),
        "small": LARGE / 4,
        "empty": LARGE[:0],
        "steps": torch.tensor(3),
    }
    elements = sum([1, 1, 2][i % 3] for i in range(count))
    base = {name: torch.zeros_like(x) if x.is_floating_point() else x for name, x in state.items()}
    names = ", ".join(f"'t{i}'" for i in range(min(count, 4))) + " and 2 others" * (count > 4)
    message = rf"^{elements} values? of {count} tensors? \({names}\) of the result overflow"
    with pytest.raises(ValueError, match=message):
        pymerge.merge([state, state], base, method="task_arithmetic")
    with pytest.warns(UserWarning, match=message) as caught:
        merged = pymerge.merge([state, state], base, method="task_arithmetic", non_finite="allow")
    assert len(caught) == 1 and merged["wide"][0] == 120000 and merged["small"][0] == 30000


@pytest.mark.parametrize("options", [{}, {"flavor": "paper"}, {"scope": "model"}])
def test_scopes_and_the_second_pass_of_a_majority(options):
    state = {"a": LARGE, "b": LARGE[:2]}
    with pytest.raises(ValueError, match="3 values of 2 tensors"):
        pymerge.ties([state, state], density=1.0, scaling=2.0, **options)


def test_only_finite_models_are_said_to_overflow():
    damaged = torch.tensor([math.nan, 60000, 1]).half()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pymerge.ties([damaged, LARGE], non_finite="allow", **SUM)
        pymerge.ties([LARGE / 2, LARGE / 2], **SUM)
        pymerge.ties([LARGE.bfloat16()] * 2, **SUM)
    with pytest.raises(ValueError, match="task vector elements"):
        pymerge.ties([damaged, LARGE], **SUM)


def test_an_output_that_is_narrower_than_the_models():
    with pytest.raises(ValueError, match=r"^1 value .*overflows float16"):
        pymerge.ties([torch.tensor([1e6, 1.0])], out=torch.empty(2).half(), density=1.0)


def test_what_the_compiled_count_does_not_take(monkeypatch):
    """Outputs on a GPU, or where nothing is compiled."""
    monkeypatch.setattr(overflow, "_compiled", lambda out: False)
    with pytest.raises(ValueError, match=r"^2 values of"):
        added()
    fine = [("a", LARGE), ("n", LARGE / 2), ("empty", LARGE[:0])]
    monkeypatch.setattr(overflow, "count_non_finite", lambda out: pytest.fail("one number says it"))
    assert overflow._counted(fine) == []
    monkeypatch.undo()
    monkeypatch.setattr(overflow, "_compiled", lambda out: False)
    bad = [("o", LARGE * 2), ("nan", LARGE * math.nan)]
    assert overflow._counted([*fine, *bad]) == [("a", 0), ("n", 0), ("o", 2), ("nan", 3)]


@pytest.mark.parametrize(
    "call",
    [
        lambda: peft.task_arithmetic([LARGE, LARGE], torch.ones(2).half()),
        lambda: peft.magnitude_prune([LARGE, LARGE], torch.ones(2).half(), 0.9),
        lambda: peft.dare_linear([LARGE] * 8, [1] * 8, 0.5),
        lambda: mergekit.merge_tensors(
            [LARGE * 0, LARGE, LARGE], "task_arithmetic", base_index=0, parameters={"weight": 1}
        ),
        lambda: mergekit.merge_state_dicts(
            [{"w": LARGE.float()}], "linear", parameters={"weight": 3, "normalize": False},
            out_dtype=torch.float16,
        ),
        lambda: ties_merging.ties_merging(torch.stack([LARGE, LARGE]), 100, "dis-sum"),
    ],
)  # fmt: skip
def test_the_drop_ins_do_not_return_infinity(call):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="of the result overflow float16"):
        call()


def test_a_mean_of_half_precision_is_within_its_terms():
    stacked = torch.stack([LARGE, LARGE])
    assert torch.equal(peft.disjoint_merge(stacked, torch.ones(2, 3).bool()), LARGE)
    tiny = torch.full((2, 1), 2.0**-24).half() * torch.tensor([[3.0], [-1.0]]).half()
    assert peft.calculate_majority_sign_mask(tiny).tolist() == [[True], [False]]


def test_initialisations_that_are_the_result():
    x, base = LARGE.repeat(3, 1), torch.zeros(3, 3).half()
    kinds = ("input_gram", "output_grad_gram", "block_fisher", "diagonal_fisher")
    nothing = SimpleNamespace(**dict.fromkeys(kinds, lambda name: None))
    options = {"init": "task_arithmetic", "base": base}
    message = r"6 values of the initialisation.*overflow float16"
    with pytest.raises(ValueError, match=message):
        pymerge.mats([x, x], [torch.zeros(3, 3)] * 2, **options)
    with pytest.raises(ValueError, match=message):
        pymerge.weighted_average([x, x], [torch.zeros(3, 3)] * 2, **options)
    with pytest.raises(ValueError, match=r"6 values of 1 tensor \('w'\)"):
        merge_with_statistics([{"w": x}] * 2, {"w": base}, [nothing] * 2, init="task_arithmetic")
    wide = pymerge.weighted_average([x.float(), x], [torch.zeros(3, 3)] * 2, **options)
    assert wide[0].tolist() == [120000, 2, -120000]
    mean = pymerge.mats([x, x], [torch.zeros(3, 3)] * 2).weight
    assert torch.equal(mean, x)
