"""The methods of docs/spec/masked.md as functions of tensors or of state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import SupportsFloat, TypeVar

import torch

from pymerge.engine.method_functions import _run
from pymerge.rules.types import Backend, MaskedFlavor, NonFinite

# All arguments of a call are of one kind: tensors give a tensor, state dicts a dict.
Model = TypeVar("Model", torch.Tensor, dict[str, torch.Tensor], Mapping[str, torch.Tensor])


def nearswap(
    models: Sequence[Model],
    base: Model,
    *,
    t: SupportsFloat,
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """Take a model's elements where it is near the base, and little of it where it is far.

    With delta = models[0] - base, element by element:

        w   = min(t / |delta|, 1)
        out = w * models[0] + (1 - w) * base

    so that no element moves by more than t. Rules P1 and P4 of docs/spec/masked.md.

    models: a list of one tensor (float32, float16, bfloat16 or float64) or of one state dict.
    base: tensor of the same shape, or state dict.
    t: how near is near, in the unit of the weights; 0 and less gives the base.
    non_finite, backend, out: as for `pymerge.ties`; a GPU's tensors are merged by plain PyTorch.

    Returns a tensor, or for state dicts a dict in the base's order, as `pymerge.merge` does, whose
    errors are raised too.

    Source: https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
    """
    return _run("nearswap", models, base, out, locals(), ("t",))


def ram(
    models: Sequence[Model],
    base: Model,
    *,
    epsilon: SupportsFloat = 1e-5,
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """Average task vectors over the models that change an element at all.

    With delta_k = models[k] - base, element by element:

        out = base + mean of delta_k over {k: |delta_k| > epsilon}

    so that what one model alone changes is not diluted by the others. Rules P1 and P5 of
    docs/spec/masked.md.

    models: K tensors of one shape (float32, float16, bfloat16 or float64, each its own dtype), or K
        state dicts.
    base: tensor or state dict of the same kind.
    epsilon: changes up to this magnitude count as none; not negative.
    non_finite, backend, out, result, errors: as for `pymerge.nearswap`.

    Source: arXiv:2601.13572 (Reinforced Agent Merging).
    """
    return _run("ram", models, base, out, locals(), ("epsilon",))


def ramplus_tl(
    models: Sequence[Model],
    base: Model,
    *,
    r: SupportsFloat = 0.1,
    alpha: SupportsFloat = 0.2,
    epsilon: SupportsFloat = 1e-5,
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """As `pymerge.ram`, with what one model alone changes reinforced.

        lambda_k = 1 + r * min(shared_k / alone_k, alpha)

    multiplies the elements that model k alone changes; shared_k counts the elements of the tensor
    that others change too, alone_k those that it alone does. Rules P1 and P5 of
    docs/spec/masked.md.

    r: how much is reinforced. alpha: the most that the ratio counts for; not negative.
    Other arguments, result, errors: as for `pymerge.ram`.

    Source: arXiv:2601.13572, RAM+ with counts of each tensor.
    """
    return _run("ramplus_tl", models, base, out, locals(), ("r", "alpha", "epsilon"))


def sce(
    models: Sequence[Model],
    base: Model,
    *,
    select_topk: SupportsFloat = 1.0,
    flavor: MaskedFlavor = "paper",
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """Select where models differ most, weigh them by energy, erase what goes against the majority.

    With delta_k = models[k] - base, 0 where the variance over the models is not among the largest:

        w_k = sum of delta_k^2 / sum over all models of the same
        s   = sign(sum_k delta_k)
        out = base + sum_{k: sign(delta_k) = s} w_k * delta_k / sum_{k agrees} w_k

    Rules P1, P2, P3 and P6 of docs/spec/masked.md.

    models: K tensors of one shape (float32, float16, bfloat16 or float64, each its own dtype), or K
        state dicts.
    base: tensor or state dict of the same kind.
    select_topk: the fraction of the elements with a variance that is selected, in [0, 1]; at 1 all
        elements are.
    flavor: "paper", or "mergekit", which weighs models alike where their mean squares sum to less
        than 1e-6 and divides by no less than 1e-6.
    non_finite, backend, out, result, errors: as for `pymerge.nearswap`.

    Source: Wan et al. 2024, arXiv:2408.07990.
    """
    return _run("sce", models, base, out, locals(), ("select_topk", "flavor"))


def arcee_fusion(
    models: Sequence[Model],
    base: Model,
    *,
    flavor: MaskedFlavor = "paper",
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """Take the elements of one model that matter most, and the base elsewhere.

    An element's importance is |models[0] - base| times the Kullback-Leibler divergence between the
    softmax of its row in both. Taken is what lies above the median by 1.5 interquartile ranges of
    all importances of the tensor. Rules P1, P2, P3 and P7 of docs/spec/masked.md.

    models: a list of one tensor (float32, float16, bfloat16 or float64) or of one state dict.
    base: tensor of the same shape, or state dict.
    flavor: "paper" has divergences in float64; "mergekit" in float32, where they are noisy.
    non_finite, backend, out, result, errors: as for `pymerge.nearswap`.

    Source: mergekit's method of that name (https://arcee.ai).
    """
    return _run("arcee_fusion", models, base, out, locals(), ("flavor",))
