"""What `pymerge.statistics.collect` refuses, how it says so, and the state in which an exception
leaves the model.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pymerge.errors import OutputError
from pymerge.statistics import KINDS, Prediction, collect


def linear_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("gram",)}, "kinds has 'gram'"),
        ({"kinds": ()}, "kinds is empty"),
        ({"labels": "fake"}, "labels='fake'"),
        ({"loss": None}, "needs gradients"),
        ({"loss": "causal"}, "loss='causal'"),
        ({"samples": 0}, "samples=0"),
        ({"layers": "nothing*"}, "nothing to collect"),
        ({"memory_limit": 10}, "memory_limit=10 bytes does not hold"),
        ({"checkpoint_every": 1}, "checkpoint_every needs out,"),
        ({"loss": lambda m, b: m(b)}, "one loss per example"),
        ({"loss": lambda m, b: m(b).sum(1)}, "return a Prediction"),
        (
            {"loss": lambda m, b: Prediction(m(b)), "labels": "empirical"},
            "needs labels in the batch",
        ),
        ({"loss": lambda m, b: Prediction(m(b)[:2])}, "2 losses for a batch of 3"),
        ({"max_dim": -1}, "max_dim=-1 is below 1"),
        ({"memory_limit": "8GB"}, "memory_limit='8GB' is a str"),
        ({"seed": 1.5}, "seed=1.5 is a float"),
        ({"samples": True}, "samples=True is a bool"),
        ({"autocast": "bf16"}, "autocast='bf16' is not a torch.dtype"),
        ({"batches": None}, "batches is a NoneType"),
        (
            {
                "batches": [{"x": torch.randn(3, 5), "example_numbers": [0, 1]}],
                "loss": lambda m, b: Prediction(m(b["x"])),
            },
            "2 numbers for 3 examples",
        ),
        ({"model": "folder"}, "model is a str"),
    ],
)
def test_errors_name_argument_and_remedy(changes, message):
    options = {
        "model": linear_model(),
        "batches": [torch.randn(3, 5)],
        "loss": lambda m, b: Prediction(m(b)),
        **changes,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        collect(**options)


def test_a_file_that_cannot_be_written_is_an_error_before_any_work(tmp_path):
    calls = []

    layer = linear_model()
    layer.register_forward_hook(lambda *a: calls.append(0))
    with pytest.raises(ValueError, match="is a folder; pass the name of a file in it"):
        collect(layer, [torch.randn(3, 5)], kinds=("input_gram",), out=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        collect(layer, [torch.randn(3, 5)], kinds=("input_gram",), out=tmp_path / "file" / "s")
    assert not calls


def test_nested_tensors_are_an_error_that_says_the_way_out():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1)
    batch = {
        "src": torch.randn(2, 3, 8),
        "src_key_padding_mask": torch.tensor([[0, 0, 0], [0, 0, 1]]).bool(),
    }
    with pytest.raises(
        ValueError, match=r"linear1 saw a nested tensor.*enable_nested_tensor=False"
    ):
        collect(model, [batch], kinds=("input_gram",), mask=None)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    assert (
        collect(model, [batch], kinds=("input_gram",), mask=None).counts("layers.0.linear1").tokens
        == 6
    )


@pytest.mark.parametrize("call", [1, 2, 3, 4])  # sharing, formulas, and two batches
def test_an_exception_leaves_the_model_as_it_was(call):
    model = linear_model()
    model[0].eval()
    model[0].weight.requires_grad_(False)
    model[-1].weight.grad = torch.ones_like(model[-1].weight)
    calls = []

    def loss(m, b):
        calls.append(0)
        if len(calls) == call:
            raise RuntimeError("stop")
        return Prediction(m(b))

    modes = [module.training for module in model.modules()]
    batches = [torch.randn(3, 5)] * 2
    numbers = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"):
        collect(model, batches, loss=loss, kinds=KINDS)
    assert len(calls) == call
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert modes == [module.training for module in model.modules()]
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert bool((model[-1].weight.grad == 1).all())
    assert torch.equal(numbers, torch.get_rng_state())


def test_non_finite_batches_are_named():
    batches = [torch.randn(3, 5), torch.full((3, 5), float("nan"))]
    with pytest.raises(FloatingPointError, match=r"batch 1 .* input_gram/0"):
        collect(linear_model(), batches, kinds=("input_gram",))
