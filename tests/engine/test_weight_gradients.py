"""Modules as models, and gradients of a merge with respect to its weights, against plain torch."""

from __future__ import annotations

import pytest
import torch

import pymerge
from pymerge.compat import mergekit as compat


def states(dtype=torch.float32, count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "w": torch.randn(40, 7, generator=generator).to(dtype),
            "v": torch.randn(11, generator=generator).to(dtype),
            "ids": torch.arange(3),
        }
        for _ in range(count)
    ]


def loss_of(merged):
    """Some function of the merged weights that is not linear."""
    return merged["w"].double().pow(2).sum() + merged["v"].double().sin().sum()


def numeric(merged_by, weights, step):
    """Central differences of the loss by each weight."""
    found = []
    for k in range(len(weights)):
        ends = []
        for sign in (1, -1):
            moved = weights.detach().clone()
            moved[k] += sign * step
            with torch.no_grad():
                ends.append(float(loss_of(merged_by(moved))))
        found.append((ends[0] - ends[1]) / (2 * step))
    return torch.tensor(found, dtype=torch.float64)


CASES = {
    "task_arithmetic": {"scaling": 0.8},
    "linear": {},
    "linear without normalize": {"normalize": False},
    "task_arithmetic normalized": {"normalize": True},
    "dare_linear": {"density": 0.5, "seed": 5},
    "dare_linear without rescale": {"density": [0.3, 0.6], "rescale": False, "seed": 5},
    "della_linear": {"density": 0.5, "epsilon": 0.2, "seed": 5},
    "breadcrumbs": {"density": 0.6, "gamma": 0.05, "rescale": True},
    "breadcrumbs over the model": {"density": [0.6, 0.4], "gamma": 0.05, "scope": "model"},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_differences(case):
    method, options = case.split()[0], CASES[case]
    base, *models = states(torch.float64)
    start = None if method == "linear" else base

    def merged_by(weights):
        return pymerge.merge(models, start, method=method, weights=weights, **options)

    weights = torch.tensor([0.7, -0.2], dtype=torch.float64, requires_grad=True)
    merged = merged_by(weights)
    loss_of(merged).backward()
    expected = numeric(merged_by, weights, 1e-4)
    assert (weights.grad - expected).abs().max() <= 1e-6 * expected.abs().max()
    with torch.no_grad():
        plain = merged_by(weights)
    assert all(torch.equal(merged[name], plain[name]) for name in plain)
    assert not merged["ids"].requires_grad and not plain["w"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_task_arithmetic_is_what_torch_gives(dtype):
    base, *models = states(dtype)
    weights = torch.tensor([0.5, 0.25], requires_grad=True)
    merged = pymerge.merge(models, base, method="task_arithmetic", weights=weights)
    loss_of(merged).backward()
    gradient = {name: torch.autograd.grad(loss_of(leaves), leaves[name])[0] for leaves in [
        {n: t.detach().requires_grad_() for n, t in merged.items() if n != "ids"}
    ] for name in leaves}  # fmt: skip
    expected = [
        sum(
            (gradient[name].double() * (model[name].float() - base[name].float()).double()).sum()
            for name in gradient
        )
        for model in models
    ]
    assert torch.allclose(weights.grad.double(), torch.stack(expected), rtol=1e-5)


def test_every_way_to_pass_weights():
    base, *models = states()
    one = torch.tensor(0.5, requires_grad=True)
    loss_of(pymerge.merge(models, base, method="task_arithmetic", weights=one)).backward()
    two = [torch.tensor(0.5, requires_grad=True), 0.5]
    loss_of(pymerge.merge(models, base, method="task_arithmetic", weight=two)).backward()
    both = torch.tensor([0.5, 0.5], requires_grad=True)
    loss_of(pymerge.merge(models, base, method="task_arithmetic", weights=both)).backward()
    assert torch.allclose(one.grad, both.grad.sum()) and torch.allclose(two[0].grad, both.grad[0])
    scale = torch.tensor([2.0], requires_grad=True)
    pymerge.merge(models[:1], method="passthrough", scale=scale)["v"].sum().backward()
    assert torch.allclose(scale.grad, models[0]["v"].sum())


def test_weights_that_are_learned_find_the_mixture():
    """AdaMerging in small: descent on the weights reaches those that the target was made by."""
    base, *models = states()
    target = pymerge.merge(models, base, method="task_arithmetic", weights=[0.3, 0.9])
    weights = torch.zeros(2, requires_grad=True)
    descent = torch.optim.SGD([weights], lr=5e-4)
    for _ in range(200):
        descent.zero_grad()
        merged = pymerge.merge(models, base, method="task_arithmetic", weights=weights)
        sum((merged[n] - target[n]).pow(2).sum() for n in ("w", "v")).backward()
        descent.step()
    assert torch.allclose(weights.detach(), torch.tensor([0.3, 0.9]), atol=1e-3)


def test_the_result_can_be_run_in_a_module():
    torch.manual_seed(0)
    base, *models = [torch.nn.Linear(4, 2) for _ in range(3)]
    weights = torch.full((2,), 0.5, requires_grad=True)
    merged = pymerge.merge(models, base, method="task_arithmetic", weights=weights)
    torch.func.functional_call(base, merged, (torch.ones(1, 4),)).sum().backward()
    assert weights.grad.abs().min() > 0


def test_tied_tensors_count_twice():
    def tied(state):
        return {"w": state["w"], "again": state["w"]}

    base, *models = map(tied, states())
    weights = torch.tensor([0.5, 0.25], requires_grad=True)
    merged = pymerge.merge(models, base, method="task_arithmetic", weights=weights)
    assert merged["w"] is merged["again"]
    (merged["w"].sum() + merged["again"].sum()).backward()
    expected = [2 * (model["w"] - base["w"]).sum() for model in models]
    assert torch.allclose(weights.grad, torch.stack(expected), rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("ties", {"density": 0.5}, "ties elects signs. Pass weights.detach"),
        ("dare_ties", {"density": 0.5}, "dare_ties elects signs"),
        ("breadcrumbs_ties", {"density": 0.5}, "breadcrumbs_ties elects signs"),
        ("task_arithmetic", {"merge": "mean"}, "task_arithmetic merges by merge='mean'"),
    ],
)
def test_what_has_no_gradient_is_refused(method, options, said):
    base, *models = states()
    weights = torch.tensor([0.5, 0.25], requires_grad=True)
    with pytest.raises(ValueError, match=said):
        pymerge.merge(models, base, method=method, weights=weights, **options)
    with torch.no_grad():
        merged = pymerge.merge(models, base, method=method, weights=weights, **options)
    assert not merged["w"].requires_grad
    pymerge.merge(models, base, method=method, weights=weights.detach(), **options)


@pytest.mark.parametrize("name", ["density", "scaling"])
def test_other_parameters_are_never_detached_in_silence(name):
    base, *models = states()
    value = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match=f"^{name} requires a gradient, which a number has not"):
        pymerge.merge(models, base, method="dare_linear", weights=1.0, **{name: value})
    tensors = [model["w"] for model in models]
    with pytest.raises(ValueError, match=f"^{name} requires a gradient"):
        pymerge.ties(tensors, **{name: value})


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_single_weights_are_never_detached_in_silence(method):
    models = states(count=2)
    weight = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match=r"^weights requires a gradient.*pass weights.detach\(\)"):
        pymerge.merge(models, method=method, weights=[weight, 0.25])
    tensors = [model["w"] for model in models]
    with pytest.raises(ValueError, match=r"^weight requires a gradient, which a number has not"):
        compat.merge_tensors(tensors, method, parameters={"weight": [weight, 0.25]})
    with torch.no_grad():
        merged = pymerge.merge(models, method=method, weights=[weight, 0.25])
    detached = pymerge.merge(models, method=method, weights=[0.5, 0.25])
    assert torch.equal(merged["w"], detached["w"])


def test_ties_itself_refuses_weights_with_a_gradient():
    tensors = [state["w"] for state in states()]
    weights = torch.ones(3, requires_grad=True)
    for given in (weights, list(weights)):
        with pytest.raises(ValueError, match=r"requires a gradient.*pymerge.merge gives weights"):
            pymerge.ties(tensors, weights=given)
    with torch.no_grad():
        pymerge.ties(tensors, weights=weights)


def test_modules_stand_for_their_state_dicts():
    torch.manual_seed(0)
    base, *models = [
        torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)) for _ in range(3)
    ]
    for method, options in (("ties", {"density": 0.5}), ("linear", {})):
        start = None if method == "linear" else base
        by_module = pymerge.merge(models, start, method=method, **options)
        dicts = [model.state_dict() for model in models]
        by_state = pymerge.merge(
            dicts, None if start is None else start.state_dict(), method=method, **options
        )
        assert list(by_module) == list(by_state)
        assert all(torch.equal(by_module[name], by_state[name]) for name in by_state)
        base.load_state_dict(by_module)
    mixed = pymerge.merge([models[0], models[1].state_dict()], method="linear")
    assert torch.equal(mixed["0.weight"], by_module["0.weight"])
    with pytest.raises(TypeError, match="models is a Sequential; pass"):
        pymerge.merge(models[0], base)


@pytest.mark.filterwarnings("ignore:.*averaged over the models")
def test_running_statistics_do_not_depend_on_the_weights():
    torch.manual_seed(0)
    base, *models = [torch.nn.BatchNorm1d(3) for _ in range(3)]
    for k, model in enumerate(models):
        model.running_mean.fill_(k + 1.0)
    weights = torch.tensor([0.5, 0.25], requires_grad=True)
    merged = pymerge.merge(models, base, method="task_arithmetic", weights=weights)
    assert merged["weight"].requires_grad and not merged["running_mean"].requires_grad
    assert merged["running_mean"].tolist() == [1.5] * 3
