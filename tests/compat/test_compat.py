"""The drop-ins: the official TIES code's golden outputs, their own arguments, and what they
refuse.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pymerge
from pymerge.compat import mergekit, peft, ties_merging

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = [
    FOLDER / f"ties_official_{name}.safetensors"
    for name in ("cont", "k2", "k8", "one", "quantised", "tiny")
]
MERGES = ("dis-mean", "dis-sum", "dis-max")


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_official_code(path, merge):
    tensors = load_file(path)
    vectors = tensors["task_vectors"]
    scale = vectors.abs().sum(0)
    runs = [key for key in tensors if key.endswith(f"|mass|{merge}") and key.startswith("topk")]
    assert len(runs) == (2 if path.stem.endswith("quantised") else 4)
    for key in runs:
        kept = key.split("|")[0].removeprefix("topk")
        merged = ties_merging.ties_merging(vectors, None if kept == "none" else float(kept), merge)
        # fp32 sums over the models in another order: at most K - 1 roundings and one of the
        # division.
        assert ((merged - tensors[key]).abs() <= len(vectors) * 2.0**-24 * scale).all(), key


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_official_code_without_election(path):
    tensors = load_file(path)
    vectors = tensors["task_vectors"]
    merges = {
        "dis-mean": "mean",
        "dis-sum": "sum",
        "magnitude": "max",
        "mean": "weighted_mean",
        "sum": "sum",
    }
    checked = 0
    for key, expected in tensors.items():
        reset, _, rest = key.partition("|none|")
        if rest not in merges or not reset.startswith("topk"):
            continue
        kept = reset.removeprefix("topk")
        density = 1.0 if kept == "none" else float(kept) / 100
        merged = pymerge.ties(
            list(vectors), flavor="paper", elect="none", merge=merges[rest], density=density
        )
        scale = vectors.abs().sum(0)
        assert ((merged - expected).abs() <= len(vectors) * 2.0**-24 * scale).all(), key
        checked += 1
    assert checked == (0 if path.stem.endswith("quantised") else 20)


@pytest.mark.parametrize("merge", MERGES)
def test_official_code_with_signs_given(merge):
    """Signs are given by one model more, which outvotes the others, is not trimmed, and merges with
    weight 0.
    """
    tensors = load_file(FOLDER / "ties_official_oracle.safetensors")
    vectors = tensors["task_vectors"]
    merged = pymerge.ties(
        [*vectors, 1e4 * tensors["signs"]],
        flavor="paper",
        density=[0.2, 0.2, 0.2, 1.0],
        weights=[1.0, 1.0, 1.0, 0.0],
        merge={"dis-mean": "weighted_mean", "dis-sum": "sum", "dis-max": "max"}[merge],
    )
    expected = tensors[f"topk20|oracle|{merge}"]
    scale = vectors.abs().sum(0)
    assert ((merged - expected).abs() <= len(vectors) * 2.0**-24 * scale).all()


def test_official_arguments():
    vectors = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    percent = ties_merging.ties_merging(vectors, 20, "dis-mean")
    assert torch.equal(percent, ties_merging.ties_merging(vectors, 0.2, "dis-mean"))
    for arguments in (
        (vectors, 0.2, "mean"),
        (vectors[0], 0.2, "dis-mean"),
        (vectors, -1, "dis-mean"),
        (vectors, 101, "dis-sum"),
    ):
        with pytest.raises(ValueError):
            ties_merging.ties_merging(*arguments)


def test_topk_values_mask():
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    kept, fraction, mask = ties_merging.topk_values_mask(rows, K=0.25, return_mask=True)
    assert mask.sum(1).tolist() == [11] * 3 and torch.allclose(fraction, torch.tensor(11 / 40))
    assert torch.equal(kept, torch.where(mask, rows, 0))
    one, share = ties_merging.topk_values_mask(rows[0], K=25)
    assert torch.equal(one, kept[0]) and share == fraction[0]
    with pytest.raises(ValueError, match="3 dimensions"):
        ties_merging.topk_values_mask(rows[None])


def test_vectors_and_state_dicts():
    state = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([7.0]), "c": torch.zeros(2)}
    vector = ties_merging.state_dict_to_vector(state, remove_keys=["c"])
    assert vector.tolist() == [7, 0, 1, 2, 3, 4, 5]
    back = ties_merging.vector_to_state_dict(vector, state, remove_keys=["c"])
    assert list(back) == ["a", "b"] and all(torch.equal(back[n], state[n]) for n in back)
    with pytest.raises(ValueError, match="vector has 7 elements, the state dict 9"):
        ties_merging.vector_to_state_dict(vector, state)


ROWS = torch.ones(2, 9)
WEIGHTS = torch.ones(2)


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        (
            ties_merging.ties_merging,
            ([ROWS[0]], 20, "dis-mean"),
            "flat_task_checks is a list; pass",
        ),
        (
            ties_merging.ties_merging,
            (ROWS, "x", "dis-mean"),
            "reset_thresh='x' is a str; pass a nu",
        ),
        (
            ties_merging.ties_merging,
            (ROWS, WEIGHTS, "dis-mean"),
            "reset_thresh is a Tensor that is",
        ),
        (ties_merging.topk_values_mask, ([ROWS[0]],), "M is a list; pass a torch.Tensor"),
        (ties_merging.topk_values_mask, (ROWS, None), "K=None is a NoneType; pass a number"),
        (ties_merging.state_dict_to_vector, ([ROWS],), "state_dict is a list; pass a state dict"),
        (
            ties_merging.state_dict_to_vector,
            ({"a": 1},),
            r"state_dict\['a'\] is an int; pass a torch",
        ),
        (ties_merging.state_dict_to_vector, ({"a": ROWS}, "ab"), "remove_keys='ab' is a str; pass"),
        (ties_merging.state_dict_to_vector, ({"a": ROWS, 1: ROWS},), "the key 1, an int"),
        (ties_merging.vector_to_state_dict, ([1.0], {"a": ROWS}), "vector is a list; pass a torch"),
        (ties_merging.vector_to_state_dict, (ROWS, {"a": 1}), r"state_dict\['a'\] is an int"),
        (peft.prune, (ROWS, "x", "magnitude"), "density='x' is a str; pass a number"),
        (peft.prune, ([1.0], 2, "magnitude"), "tensor is a list; pass a torch.Tensor"),
        (peft.random_pruning, (ROWS, [0.5], True), "density=.* is a list; pass a number"),
        (peft.ties, (list(ROWS), WEIGHTS, None), "density=None is a NoneType; pass a number"),
        (peft.ties, (list(ROWS), WEIGHTS.to(torch.float8_e4m3fn), 0.5), "weights are torch.float8"),
        (peft.dare_ties, (3, WEIGHTS, 0.5), "task_tensors is an int; pass a list of torch.Tensor"),
        (peft.calculate_majority_sign_mask, ([ROWS],), "tensor is a list; pass a torch.Tensor"),
        (peft.disjoint_merge, ([ROWS], ROWS > 0), "task_tensors is a list; pass a torch.Tensor"),
        (peft.disjoint_merge, (ROWS, [1]), "majority_sign_mask is a list; pass a torch.Tensor"),
        (mergekit.sparsify, (ROWS, "x", "magnitude"), "density='x' is a str; pass a number"),
    ],
)
def test_arguments_of_other_types(function, arguments, said):
    with pytest.raises(TypeError, match=said):
        function(*arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        (
            ties_merging.ties_merging,
            (ROWS, 20, ["dis-mean"]),
            "merge_func=.* is not one of 'dis-me",
        ),
        (ties_merging.ties_merging, (ROWS, 10**400, "dis-mean"), "reset_thresh=inf is not finite"),
        (ties_merging.state_dict_to_vector, ({},), "state_dict has no tensors"),
        (peft.ties, (list(ROWS), WEIGHTS, 0.5, ["total"]), "majority_sign_method=.* is not one of"),
        (mergekit.sparsify, (ROWS, 0.5, ["magnitude"]), "method=.* is unknown; there are"),
    ],
)
def test_values_that_are_none_of_the_allowed(function, arguments, said):
    with pytest.raises(ValueError, match=said):
        function(*arguments)


def test_names_that_are_misspelt():
    models = [{"w": ROWS}, {"w": ROWS}]
    with pytest.raises(TypeError, match=r"no parameter 'wieght'; it has weight.*mean 'weight'"):
        mergekit.merge_state_dicts(models, "linear", parameters={"wieght": 1})
    for call in (
        lambda: mergekit.merge_state_dicts(models, "tie"),
        lambda: mergekit.merge_tensors([ROWS, ROWS], "tie"),
        lambda: pymerge.merge(models, models[0], method="tie"),
    ):
        with pytest.raises(ValueError, match=r"^method='tie' is not one of .*did you mean 'ties'"):
            call()


def test_peft_worked_example():
    tensors = [torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([2.0, 1.5, -1.0, 0.0])]
    weights = torch.tensor([1.0, 0.5])
    assert peft.ties(tensors, weights, 0.5).tolist() == [1.0, -2.0, 3.0, 0.0]
    assert peft.magnitude_prune(tensors, weights, 0.5).tolist() == [1.0, -1.25, 3.0, 0.0]
    assert peft.task_arithmetic(tensors, weights).tolist() == [2.0, -1.25, 2.5, 0.5]
    assert peft.prune(tensors[0], 0.5, "magnitude").tolist() == [0, -2, 3, 0]


def test_peft_random_masks_follow_torchs_generator():
    ones = torch.ones(1000)
    torch.manual_seed(0)
    first, second = peft.random_pruning(ones, 0.3, True), peft.random_pruning(ones, 0.3, True)
    torch.manual_seed(0)
    assert torch.equal(first, peft.random_pruning(ones, 0.3, True))
    assert not torch.equal(first, second)
    assert set(first.tolist()) == {0.0, float(torch.tensor(1.0) / torch.tensor(0.3))}


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_the_share_and_the_mean(density):
    n = 200_000
    torch.manual_seed(1)
    tensors = [torch.ones(n), torch.ones(n)]
    merged = peft.dare_linear(tensors, torch.tensor([1.0, 2.0]), density)
    values, counts = (merged * density).round().long().unique(return_counts=True)
    share = dict(zip(values.tolist(), (counts / n).tolist(), strict=True))
    off, on = 1 - density, density
    for value, probability in {0: off * off, 1: on * off, 2: off * on, 3: on * on}.items():
        # Five standard deviations of a binomial share.
        assert abs(share[value] - probability) < 5 * (probability * (1 - probability) / n) ** 0.5
    assert abs(merged.mean().item() - 3) < 5 * (5 * (1 / density - 1) / n) ** 0.5


def test_peft_arguments():
    tensor = torch.randn(10)
    for density in (1, 1.5):
        with pytest.warns(UserWarning, match="keeps everything"):
            assert peft.prune(tensor, density, "magnitude") is tensor
        with pytest.warns(UserWarning, match="keeps everything"):
            assert torch.equal(peft.magnitude_prune([tensor], torch.ones(1), density), tensor)
    with pytest.raises(ValueError, match="is negative"):
        peft.prune(tensor, -0.1, "magnitude")
    with pytest.raises(ValueError, match="'magnitude', 'random'"):
        peft.prune(tensor, 0.1, "top")
    with pytest.raises(ValueError, match="'total', 'frequency'"):
        peft.ties([tensor], torch.ones(1), 0.5, "majority")
    with pytest.raises(ValueError, match="weights has 1 value for 2 models"):
        peft.ties([tensor, tensor], torch.ones(1), 0.5)


def test_mergekit_state_dicts():
    generator = torch.Generator().manual_seed(0)
    states = {
        key: {"w": torch.randn(6, generator=generator), "n": torch.tensor([1])} for key in "xyz"
    }
    parameters = {"weight": {"x": 0.5, "z": 0.25}, "normalize": False}
    merged = mergekit.merge_state_dicts(states, "task_arithmetic", parameters=parameters, base="y")
    base = states["y"]["w"]
    expected = base + (0.5 * (states["x"]["w"] - base) + 0.25 * (states["z"]["w"] - base))
    assert torch.allclose(merged["w"], expected) and torch.equal(merged["n"], states["y"]["n"])
    half = mergekit.merge_state_dicts(
        list(states.values()), "linear", parameters={"weight": [1, 1, 2]}, out_dtype=torch.float16
    )
    assert half["w"].dtype == torch.float16
    layer = torch.nn.Linear(2, 2)
    same = mergekit.merge_state_dicts([layer, layer], "linear", parameters={"weight": 1})
    assert torch.allclose(same["weight"], layer.weight)


def test_mergekit_refusals():
    a, b = {"w": torch.ones(3), "n": torch.tensor(1)}, {"w": torch.ones(3), "n": torch.tensor(2)}
    with pytest.raises(ValueError, match="'n' is not floating point and differs"):
        mergekit.merge_state_dicts([a, b], "linear", parameters={"weight": 1})
    a.pop("n"), b.pop("n")
    with pytest.raises(TypeError, match="linear needs parameter 'weight'"):
        mergekit.merge_state_dicts([a, b], "linear")
    with pytest.raises(TypeError, match="has no parameter 'wieght'"):
        mergekit.merge_state_dicts([a, b], "linear", parameters={"wieght": 1})
    with pytest.raises(ValueError, match="ties needs a base"):
        mergekit.merge_state_dicts([a, b], "ties", parameters={"weight": 1})
    with pytest.raises(ValueError, match="weight has 3 values for 2 models"):
        mergekit.merge_state_dicts([a, b], "linear", parameters={"weight": [1, 2, 3]})
    with pytest.raises(ValueError, match="density: 20 is outside"):
        mergekit.merge_state_dicts([a, b], "ties", parameters={"weight": 1, "density": 20}, base=0)
    with pytest.raises(ValueError, match="lacks"):
        mergekit.merge_state_dicts([a, {}], "linear", parameters={"weight": 1})
    assert (
        mergekit.merge_state_dicts([a, {}], "linear", parameters={"weight": 1}, strict=False) == {}
    )
    with pytest.raises(ValueError, match="leaves \\[0, 1\\]"):
        mergekit.sparsify(a["w"], 0.5, "della_magprune", epsilon=0.6)
    with pytest.raises(ValueError, match="dtype"):
        mergekit.merge_tensors([a["w"]], "linear", parameters={"weight": 1}, dtype=torch.int8)


def test_mergekit_tensors():
    base, x = torch.zeros(4), torch.tensor([1.0, -2.0, 3.0, 4.0])
    merged = mergekit.merge_tensors(
        [base, x], "ties", parameters={"weight": 1.0, "density": 0.5}, base_index=0
    )
    assert merged.tolist() == [0, 0, 3, 4]
    only_base = mergekit.merge_tensors([x], "ties", parameters={"weight": 1.0}, base_index=0)
    assert torch.equal(only_base, x) and only_base is not x
    assert torch.equal(mergekit.merge_tensors([x], "passthrough"), x)
    assert mergekit.sparsify(x, 0.5, "magnitude").tolist() == [0, 0, 3, 4]
    assert mergekit.sparsify(x, 0.5, "magnitude", rescale_norm="linf").tolist() == [0, 0, 3, 4]
    with pytest.raises(ValueError, match="different ids"):
        mergekit.merge_tensors([x, x], "linear", parameters={"weight": 1}, ids=["a", "a"])
    with pytest.raises(ValueError, match="base_index"):
        mergekit.merge_tensors([x], "ties", parameters={"weight": 1}, base_index=1)
