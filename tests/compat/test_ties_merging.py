"""All of the official TIES module: its golden outputs in every mode, the parts by themselves, and
what they refuse.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pymerge.compat import ties_merging as official

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = {
    path.stem.removeprefix("ties_official_"): path
    for path in sorted(FOLDER.glob("ties_official_*.safetensors"))
}
RUNS = {"cont": 122, "k2": 122, "k8": 162, "one": 162, "oracle": 3, "quantised": 6, "tiny": 162}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", RUNS)
def test_every_golden_run(name):
    tensors = load_file(GOLDEN[name])
    vectors = tensors["task_vectors"]
    # fp32 sums over the models in another order: at most K - 1 roundings and one of the division.
    allowed = len(vectors) * 2.0**-24 * vectors.abs().sum(0)
    runs = [key for key in tensors if key.count("|") == 2]
    assert len(runs) == RUNS[name]
    for key in runs:
        reset, resolve, merge = key.split("|")
        kind = next(kind for kind in ("topk", "std", "nf") if reset.startswith(kind))
        rest = reset.removeprefix(kind)
        thresh = rest if rest == "none" else float(rest)
        if resolve == "oracle":
            merged = official.merge_with_oracle_sign(tensors["signs"], vectors, thresh, merge)
        else:
            merged = official.merge_methods(kind, vectors, thresh, resolve, merge)
        assert merged.dtype == torch.float32
        assert ((merged - tensors[key]).abs() <= allowed).all(), key


@pytest.mark.parametrize("name", ["cont", "k8", "tiny"])
def test_the_parts_give_what_the_whole_gives(name):
    """Trim, resolve and merge by themselves, in the order of the official code."""
    vectors = load_file(GOLDEN[name])["task_vectors"]
    kept, _ = official.topk_values_mask(vectors, 20)
    signs = official.resolve_sign(kept, "mass")
    for merge in ("dis-mean", "dis-sum", "dis-max"):
        whole = official.ties_merging(vectors, 20, merge)
        assert torch.equal(official.disjoint_merge(kept, merge, signs), whole)
        assert torch.equal(official.merge_methods("topk", vectors, 0.2, "mass", merge), whole)
    assert torch.equal(official.tv_merging(vectors), official.aggregate(vectors, "sum", None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_are_those_of_the_official_code(dtype):
    """A mean divides by fp32 counts there, so that it is fp32 for 16-bit inputs; the rest keeps its
    dtype.
    """
    rows = drawn(3, 64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    signs = official.resolve_sign(rows, "mass")
    assert signs.dtype == dtype
    for resolve in ("mass", "normfrac", "normmass", "none"):
        for merge in ("dis-mean", "dis-sum", "mean", "sum", "median", "magnitude"):
            merged = official.merge_methods("topk", rows, 20, resolve, merge)
            assert merged.dtype == (wide if merge == "dis-mean" else dtype), (resolve, merge)
    assert official.ties_merging(rows, 20, "dis-mean").dtype == wide
    assert official.ties_merging(rows, 20, "dis-max").dtype == dtype
    kept, share = official.topk_mask_preserve_normfrac(rows, 0.5)
    assert kept.dtype == dtype and share.dtype == torch.float32


def test_a_half_precision_mean_is_not_rounded_to_half():
    rows = torch.tensor([[1.0, 1.0], [1.0009765625, 3.0]], dtype=torch.float16)
    assert official.ties_merging(rows, 100, "dis-mean").tolist() == [1.00048828125, 2.0]


SMALL = torch.tensor([[3.0, -4.0, 0.0, 1.0], [-1.0, -2.0, 5.0, 0.0]])


def test_signs():
    assert official.resolve_sign(SMALL, "mass").tolist() == [1, -1, 1, 1]
    # Shares of the norm: 3/sqrt(26) > 1/sqrt(30), ...
    assert official.normfrac_based_sign(SMALL).tolist() == [1, -1, 1, 1]
    assert official.normmass_based_sign(SMALL).tolist() == [1, -1, 1, 1]
    # The mass elects what is larger, the shares what is larger beside the rest of its row.
    rows = torch.tensor([[2.0, 100.0], [-1.0, 0.5]])
    assert official.resolve_sign(rows, "mass").tolist() == [1, 1]
    assert official.resolve_sign(rows, "normfrac").tolist() == [-1, 1]
    assert official.resolve_sign(rows, "normmass").tolist() == [-1, 1]


def test_zero_signs():
    signs = torch.tensor([1.0, 0.0, -1.0, -1.0])
    same = official.resolve_zero_signs(signs)
    assert same is signs and signs.tolist() == [1, -1, -1, -1]
    assert official.resolve_zero_signs(torch.tensor([1, 0, 1]), "minority").tolist() == [1, -1, 1]
    assert official.resolve_zero_signs(torch.tensor([1, 0, -1]), "majority").tolist() == [1, 0, -1]
    assert official.resolve_zero_signs(torch.tensor([1, 0]), "other").tolist() == [1, 0]
    assert official.resolve_sign(torch.tensor([[1.0, 2.0], [-1.0, 1.0]])).tolist() == [1, 1]


def test_a_row_of_zeros_elects_nothing():
    rows = torch.stack([torch.zeros(4), SMALL[1]])
    for method in ("mass", "normfrac", "normmass"):
        assert official.resolve_sign(rows, method).tolist() == [-1, -1, 1, -1]


def test_disjoint_merge():
    signs = torch.tensor([-1, -1, 1, 0])
    assert official.disjoint_merge(SMALL, "dis-mean", signs).tolist() == [-1, -3, 5, 0]
    assert official.disjoint_merge(SMALL, "dis-sum", signs).tolist() == [-1, -6, 5, 0]
    assert official.disjoint_merge(SMALL, "max", signs).tolist() == [-1, -4, 5, 0]
    assert official.disjoint_merge(SMALL, "mean", None).tolist() == [1, -3, 5, 1]
    with pytest.raises(ValueError, match="needs signs; pass sign_to_mult"):
        official.disjoint_merge(SMALL, "dis-max", None)


def test_aggregate():
    rows = torch.cat([SMALL, torch.ones(1, 4)])
    assert official.aggregate(rows, "median", None).tolist() == [1, -2, 1, 1]
    assert official.aggregate(rows, "magnitude", None).tolist() == [3, -4, 5, 1]
    assert official.aggregate(rows, "sum", None).tolist() == [3, -5, 6, 2]
    signs = torch.tensor([-1.0, 1.0, 0.0, 1.0])
    assert official.aggregate(rows, "sum", signs).tolist() == [-3, 5, 0, 2]
    assert official.aggregate(SMALL, "mean", None, dim=1).tolist() == [0, 0.5]
    named = official.basic_merging("sum", rows, [{"b": torch.empty(3), "a": torch.empty(1)}], [])
    assert {name: value.tolist() for name, value in named.items()} == {"a": [3], "b": [-5, 6, 2]}


def test_masks():
    rows = torch.tensor([[1.0, 2.0, 3.0, 4.0, 10.0], [0.0, 0.0, 0.0, -6.0, 1.0]])
    kept, share, mask = official.greater_than_std_mask(rows, 1.0, return_mask=True)
    assert kept.tolist() == [[0, 0, 0, 0, 10], [0, 0, 0, -6, 0]]
    assert mask.sum(1).tolist() == [1, 1] and torch.equal(share, torch.tensor([0.2, 0.2]))
    nearer, _ = official.less_than_std_mask(rows, 1.0)
    assert torch.equal(nearer + kept, rows)
    low, part = official.bottomk_values_mask(rows, 40)
    assert low.tolist() == [[1, 2, 0, 0, 0], [0] * 5]
    assert torch.equal(part, torch.tensor([0.4, 0.6]))  # three zeros are equal to the second
    # 100 + 16 of 130 is the first share above 0.85; the last element is always kept.
    norm, _, found = official.topk_mask_preserve_normfrac(
        torch.tensor([[10.0, 3.0, 2.0, 4.0, 1.0]]), 0.85, return_mask=True
    )
    assert norm.tolist() == [[10, 0, 0, 4, 1]] and torch.equal(found, norm != 0)
    # Rounding keeps some of these sums of squares below 1.
    for n in range(2, 60):
        everything, _ = official.topk_mask_preserve_normfrac(torch.ones(1, n), 1.0)
        assert torch.equal(everything, torch.ones(1, n))
    ratio = official.sign_agreement_ratio(torch.tensor([[1.0, 1, 0], [2, -1, 0], [3, 5, 0]]))
    assert torch.equal(ratio, torch.tensor([1, 1 / 3, 1]))


def test_tied_keys_come_back():
    shared = drawn(5, 2)
    tied = ["transformer.encoder.embed_tokens.weight", "transformer.decoder.embed_tokens.weight"]
    state = {"transformer.shared.weight": shared, **dict.fromkeys(tied, shared), "z": drawn(3)}
    vector = official.state_dict_to_vector(state, tied)
    assert vector.numel() == 13
    back = official.vector_to_state_dict(vector, state, tied)
    assert official.check_state_dicts_equal(back, state)
    assert all(back[name] is back["transformer.shared.weight"] for name in tied)
    # Without the shared tensor there is nothing that they could be.
    plain = {name: state[name] for name in (*tied, "z")}
    assert list(official.vector_to_state_dict(drawn(3), plain, tied)) == ["z"]


def test_state_dicts():
    one, other = {"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(1)}
    assert official.add_ptm_to_tv(one, {"a": torch.tensor([1.0, 2.0])})["a"].tolist() == [2, 3]
    assert official.check_parameterNamesMatch([one]) is None
    assert official.check_parameterNamesMatch([other, other]) is None
    with pytest.raises(
        ValueError, match=r"Differing .* checkpoints\[0\] and checkpoints\[2\] has b"
    ):
        official.check_parameterNamesMatch([one, one, other])
    with pytest.raises(ValueError, match="Differing parameter names in models"):
        official.add_ptm_to_tv(one, other)
    assert official.check_state_dicts_equal(one, {"a": torch.ones(2).double()})
    for different in (other, {"a": torch.zeros(2)}, {"a": torch.ones(1)}, {}):
        assert not official.check_state_dicts_equal(one, different)


NAN, INFINITE = SMALL.clone(), SMALL.clone()
NAN[1, 2], INFINITE[1, 2] = torch.nan, -torch.inf


@pytest.mark.parametrize("rows", [NAN, INFINITE], ids=["nan", "infinite"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: official.ties_merging(x, 20, "dis-mean"), "flat_task_checks"),
        *(
            (
                lambda x, k=kind, r=resolve, m=merge: official.merge_methods(k, x, 0.5, r, m),
                "flat_task_checks",
            )
            for kind in ("topk", "std", "nf", "none")
            for resolve in ("mass", "normfrac", "none")
            for merge in ("dis-mean", "median")
        ),
        (
            lambda x: official.merge_with_oracle_sign(torch.ones(4), x, 20, "dis-sum"),
            "flat_task_checks",
        ),
        (official.tv_merging, "tv_flat_checks"),
        (lambda x: official.aggregate(x, "median", None), "T"),
        (lambda x: official.aggregate(x, "sum", torch.ones(4)), "T"),
        (lambda x: official.disjoint_merge(x, "dis-mean", torch.ones(4)), "Tensor"),
        (lambda x: official.disjoint_merge(x, "dis-mean", None), "Tensor"),
        (lambda x: official.resolve_sign(x, "mass"), "Tensor"),
        (official.normfrac_based_sign, "Tensor"),
        (official.normmass_based_sign, "Tensor"),
        (official.topk_values_mask, "M"),
        (official.bottomk_values_mask, "M"),
        (lambda x: official.greater_than_std_mask(x, 1), "tensor"),
        (lambda x: official.less_than_std_mask(x, 1), "tensor"),
        (official.topk_mask_preserve_normfrac, "T"),
    ],
)
def test_values_that_are_not_finite_are_refused(function, name, rows):
    with pytest.raises(ValueError, match=rf"NaN or infinite .*\({name}\[1\]: 1, of 4\); mend"):
        function(rows)


def test_an_overflow_of_half_precision_is_refused():
    rows = torch.full((2, 4), 60000.0, dtype=torch.float16)
    for call in (
        lambda: official.merge_methods("topk", rows, "none", "normfrac", "dis-sum"),
        lambda: official.tv_merging(rows),
        lambda: official.disjoint_merge(rows, "sum", torch.ones(4)),
    ):
        with pytest.raises(ValueError, match="overflow float16"):
            call()
    assert (
        official.merge_methods("topk", rows, "none", "normfrac", "dis-mean").tolist() == [6e4] * 4
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: official.merge_methods("tokp", SMALL, 20, "mass", "dis-mean"),
            "reset_type='tokp'",
        ),
        (lambda: official.merge_methods("topk", SMALL, 20), "resolve_method=None is not one of"),
        (lambda: official.merge_methods("topk", SMALL, 20, "mas", "sum"), "resolve_method='mas'"),
        (lambda: official.merge_methods("topk", SMALL, 20, "mass", ""), "merge_func='' is not one"),
        (lambda: official.merge_methods("topk", SMALL, 20, "mass", "dis-min"), "'dis-min' is not"),
        (lambda: official.merge_methods("topk", SMALL, 20, "none", "dis-max"), "needs signs; pass"),
        (lambda: official.merge_methods("topk", SMALL, 101, "none", "sum"), "reset_thresh=101 is"),
        (
            lambda: official.merge_methods("nf", SMALL, 2, "none", "sum"),
            "reset_thresh=2 is outside",
        ),
        (lambda: official.merge_methods("topk", SMALL[0], 20, "mass", "sum"), "has 1 dimension"),
        (lambda: official.resolve_sign(SMALL, "norm"), "resolve_method='norm' is not one of"),
        (lambda: official.aggregate(SMALL, "max", None), "agg_type='max' is not one of 'mean'"),
        (lambda: official.aggregate(SMALL, "sum", torch.ones(3)), r"has shape \(3,\); pass one"),
        (lambda: official.aggregate(SMALL, "sum", NAN[1]), r"final_signs\[0\]: 1, of 4"),
        (lambda: official.bottomk_values_mask(SMALL, 0.1), "K=0.1 of 4 elements is none"),
        (lambda: official.topk_mask_preserve_normfrac(SMALL, 90), "normfrac=90 is outside"),
        (lambda: official.tv_merging(SMALL[:0]), "has no rows"),
    ],
)
def test_values_that_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: official.merge_methods(1, SMALL, 20, "mass", "sum"), "reset_type is an int; pass"),
        (lambda: official.merge_methods("std", SMALL, "x", "mass", "sum"), "reset_thresh='x' is a"),
        (lambda: official.tv_merging([SMALL]), "tv_flat_checks is a list; pass a torch.Tensor"),
        (lambda: official.tv_merging(SMALL.int()), r"tv_flat_checks\[0\] is int32"),
        (lambda: official.disjoint_merge(SMALL, "sum", [1]), "sign_to_mult is a list; pass"),
        (lambda: official.check_parameterNamesMatch({}), "checkpoints is a dict; pass a list"),
        (lambda: official.check_parameterNamesMatch([1]), r"checkpoints\[0\] is an int; pass a st"),
        (lambda: official.check_state_dicts_equal([], {}), "state_dict1 is a list; pass a state"),
        (lambda: official.add_ptm_to_tv({"a": 1}, {"a": 1}), r"tv_dict\['a'\] is an int; pass a"),
    ],
)
def test_types_that_are_refused(call, said):
    with pytest.raises(TypeError, match=said):
        call()
