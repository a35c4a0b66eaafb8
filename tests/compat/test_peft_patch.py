"""peft with the patch on: the same functions in every module, the same dtypes and kinds of errors,
and real LoRA models merged as without it (pytest -m parity).
"""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch
from peft_cases import KINDS, tiny

from pymerge.compat import peft as ours

pytestmark = pytest.mark.parity

peft = pytest.importorskip("peft", reason="peft is not installed")
merge_utils = pytest.importorskip("peft.utils.merge_utils")

NAMES = [
    "calculate_majority_sign_mask",
    "dare_linear",
    "dare_ties",
    "disjoint_merge",
    "magnitude_based_pruning",
    "magnitude_prune",
    "prune",
    "random_pruning",
    "task_arithmetic",
    "ties",
]
THEIRS = {name: getattr(merge_utils, name) for name in NAMES}
LORA = "peft.tuners.lora.model"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def of_module(module, names=NAMES):
    return {name: vars(sys.modules[module]).get(name) for name in names}


@pytest.fixture(autouse=True)
def unpatched():
    yield
    ours.unpatch()
    assert of_module("peft.utils.merge_utils") == THEIRS


def test_every_function_is_replaced_and_put_back():
    mine = {name: getattr(ours, name) for name in NAMES}
    used = ("dare_linear", "dare_ties", "magnitude_prune", "task_arithmetic", "ties")
    ours.patch()
    ours.patch()  # once more changes nothing
    assert of_module("peft.utils.merge_utils") == mine
    assert of_module(LORA, used) == {name: mine[name] for name in used}
    ours.unpatch()
    assert of_module("peft.utils.merge_utils") == THEIRS
    assert of_module(LORA, used) == {name: THEIRS[name] for name in used}


def test_a_with_block_ends_what_it_began():
    with ours.patch():
        with ours.patch():
            assert merge_utils.ties is ours.ties
        assert merge_utils.ties is ours.ties
    assert merge_utils.ties is THEIRS["ties"]
    with pytest.raises(KeyError), ours.patch():
        raise KeyError
    assert merge_utils.ties is THEIRS["ties"]
    ours.patch()
    with ours.patch():
        pass
    assert merge_utils.ties is ours.ties


def test_modules_imported_meanwhile_are_put_back_too(monkeypatch):
    late = types.ModuleType("peft.late")
    monkeypatch.setitem(sys.modules, "peft.late", late)
    other = types.ModuleType("pefter")
    monkeypatch.setitem(sys.modules, "pefter", other)
    other.ties = THEIRS["ties"]
    with ours.patch():
        late.ties_of_another_name = merge_utils.ties
        assert late.ties_of_another_name is ours.ties
    assert late.ties_of_another_name is THEIRS["ties"] and other.ties is THEIRS["ties"]


def call(functions, name, tensors, weights):
    """One of the functions, with peft's arguments."""
    function = functions[name]
    if name == "prune":
        return function(tensors[0], 0.5, "random", rescale=True)
    if name in ("magnitude_based_pruning", "random_pruning"):
        more = (True,) if name == "random_pruning" else ()
        return function(tensors[0], 0.5, *more)
    if name == "calculate_majority_sign_mask":
        return function(torch.stack(tensors))
    if name == "disjoint_merge":
        stacked = torch.stack(tensors)
        return function(stacked, stacked > 0)
    return function(tensors, weights, *(() if name == "task_arithmetic" else (0.5,)))


MINE = {name: getattr(ours, name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", [*DTYPES, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dtypes_promote_as_in_peft(name, dtype, weights):
    tensors = [torch.ones(2, 3, dtype=dtype), -torch.ones(2, 3, dtype=dtype)]
    results = [
        call(each, name, tensors, torch.tensor([1, 2]).to(weights)) for each in (MINE, THEIRS)
    ]
    assert results[0].dtype == results[1].dtype and results[0].shape == results[1].shape


@pytest.mark.parametrize(("one", "other"), [*itertools.product(DTYPES, DTYPES)])
def test_adapters_of_several_dtypes_promote_as_in_peft(one, other):
    tensors = [torch.ones(4, dtype=one), torch.ones(4, dtype=other)]
    for weights in (torch.ones(2, dtype=torch.bfloat16), torch.ones(2)):
        results = [call(each, "task_arithmetic", tensors, weights) for each in (MINE, THEIRS)]
        assert results[0].dtype == results[1].dtype and torch.equal(*results)


ONES = [torch.ones(4), torch.ones(4)]
WEIGHTS = torch.ones(2)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("task_arithmetic", ([torch.ones(4), torch.ones(5)], WEIGHTS)),
        ("task_arithmetic", ([], WEIGHTS)),
        ("task_arithmetic", (ONES, torch.ones(3))),
        ("task_arithmetic", ([torch.ones(4), 3], WEIGHTS)),
        ("magnitude_prune", ([torch.ones(4), torch.ones(5)], WEIGHTS, 0.5)),
        ("magnitude_prune", (ONES, WEIGHTS, -0.5)),
        ("magnitude_prune", (ONES, WEIGHTS, None)),
        ("magnitude_prune", (ONES, WEIGHTS, "0.5")),
        ("ties", (ONES, WEIGHTS, 0.5, "most")),
        ("ties", (ONES, torch.ones(3), 0.5)),
        ("ties", (ONES, WEIGHTS, -1)),
        ("ties", ([torch.ones(4), torch.ones(5)], WEIGHTS, 0.5)),
        ("dare_linear", (ONES, WEIGHTS, -1)),
        ("dare_linear", (ONES, WEIGHTS, None)),
        ("dare_ties", (ONES, WEIGHTS, 0.5, "most")),
        ("prune", (ONES[0], -0.5, "random")),
        ("prune", (ONES[0], 0.5, "top")),
        ("calculate_majority_sign_mask", (torch.ones(2, 3), "most")),
        ("disjoint_merge", (torch.ones(2, 3), torch.ones(2, 4))),
    ],
)
def test_errors_are_of_pefts_types(name, arguments):
    with pytest.raises(Exception) as theirs:
        THEIRS[name](*arguments)
    with pytest.raises(theirs.type):
        MINE[name](*arguments)


def with_adapters(kind, dtype, autocast):
    config = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    options = {"autocast_adapter_dtype": autocast}
    model = peft.get_peft_model(tiny(kind, dtype), config, adapter_name="a", **options)
    model.add_adapter("b", config, **options)
    # Without bf16's equal magnitudes, of which peft keeps those that its sort puts first.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                values = (torch.randperm(weight.numel(), generator=generator) + 1) / 128
                signs = torch.randint(2, values.shape, generator=generator) * 2 - 1
                weight.copy_((values * signs).reshape(weight.shape))
    return model


def merged_weights(model, name):
    return {key: w.detach() for key, w in model.state_dict().items() if f".{name}." in key}


SVD = ("svd", "ties_svd", "magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd")
PLAIN = ("linear", "ties", "magnitude_prune", "dare_linear", "dare_ties", "cat")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_adapters_are_merged_as_without_the_patch(kind, dtype):
    """GPT-2's adapters in fp32, as peft casts them unless told otherwise, the others' in `dtype`."""
    autocast = kind == "gpt2"
    model = with_adapters(kind, dtype, autocast)
    adapters, weights = ["a", "b"], [0.75, -0.5]
    text = torch.arange(8)[None]
    for combination in (*PLAIN, *SVD):
        options = {} if combination in ("linear", "cat", "svd") else {"density": 0.5}
        names = [f"{combination}_theirs", f"{combination}_ours"]
        model.add_weighted_adapter(adapters, weights, names[0], combination, **options)
        with ours.patch():
            model.add_weighted_adapter(adapters, weights, names[1], combination, **options)
        theirs, mine = (merged_weights(model, name) for name in names)
        assert [w.dtype for w in theirs.values()] == [w.dtype for w in mine.values()]
        assert [w.shape for w in theirs.values()] == [w.shape for w in mine.values()]
        if not combination.startswith(("dare", "ties_svd", "magnitude_prune_svd")):
            products = [
                {k: m.get_delta_weight(name).float() for k, m in model.named_modules() if hasattr(m, "get_delta_weight")}
                for name in names
            ]  # fmt: skip
            for key, expected in products[0].items():
                error = (products[1][key] - expected).abs().max()
                # Two factors, rounded to the adapters' dtype; peft rounds fp16 and bf16 in between.
                step = torch.finfo(torch.float32 if autocast else dtype).eps
                assert error <= 64 * step * expected.abs().max(), (combination, key)
        model.set_adapter(names[1])
        assert model(text).logits.isfinite().all()


def test_random_masks_follow_torchs_generator():
    model = with_adapters("llama", torch.float32, True)
    found = []
    with ours.patch():
        for name, seed in (("x", 3), ("y", 3), ("z", 4)):
            torch.manual_seed(seed)
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], name, "dare_linear", density=0.5)
            found.append([*merged_weights(model, name).values()])
    assert all(torch.equal(x, y) for x, y in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(x, z) for x, z in zip(found[0], found[2], strict=True))


def test_an_adapter_of_nan_is_refused_by_name():
    model = with_adapters("llama", torch.float32, True)
    with torch.no_grad():
        next(w for n, w in model.named_parameters() if "lora_A.b" in n)[0, 0] = torch.nan
    with ours.patch(), pytest.raises(ValueError, match=r"NaN or infinite .*task_tensors\[1\]: 1"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "linear")
