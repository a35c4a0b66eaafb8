"""`collect`: run a model over batches and add up its statistics, in as many passes as memory asks
for (rules S1 to S9).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pymerge.checkpoint.schemas import KINDS
from pymerge.messages.arguments import argument, check_flags
from pymerge.messages.words import shown, type_of
from pymerge.ops.memory import check_readable
from pymerge.rules import types
from pymerge.rules.mats import MAX_DIM
from pymerge.rules.ties import _number
from pymerge.statistics._batches import Batches, Mask, Source, model_device, to_device
from pymerge.statistics._file import Statistics, writable
from pymerge.statistics._functional import candidates, parts_of, plain_forward, products_of
from pymerge.statistics._hooks import SharedInputs
from pymerge.statistics._loss import LABELS, Loss, named_loss
from pymerge.statistics._memory import default_limit
from pymerge.statistics._options import GRADIENT_KINDS, Options, Progress
from pymerge.statistics._passes import Collection, autocast_of, forward_only
from pymerge.statistics._targets import (
    NameFilter,
    Targets,
    convolution_shape,
    find_targets,
    name_filter,
    plan_passes,
)


def collect(
    model: nn.Module,
    batches: Batches,
    *,
    loss: types.Task | Loss | None = None,
    kinds: Sequence[types.Kind] = ("input_gram", "output_grad_gram"),
    layers: NameFilter = None,
    parameters: NameFilter = None,
    labels: types.Labels = "true",
    samples: int = 1,
    seed: int = 0,
    mask: Mask = "attention_mask",
    max_tokens: int | None = None,
    max_dim: int = MAX_DIM,
    memory_limit: int | None = None,
    share_inputs: bool = True,
    autocast: torch.dtype | None = None,
    loss_scale: float = 1.0,
    eval_mode: bool = True,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    checkpoint_every: int | None = None,
    resume: bool = False,
    model_name: str = "",
    rename: Callable[[str], str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Statistics:
    """Run `model` over `batches` and add up the statistics that merging by MaTS, RegMean or Fisher
    needs.

    With x the input and g the gradient at the output of a linear layer at one unmasked position,
    and v_n the gradient of example n's loss by a parameter (rules S3 to S6 of
    docs/spec/statistics.md):

        input_gram        sum x x^T            (d_in, d_in)   per linear layer (Linear, Conv1D)
        output_grad_gram  sum g g^T            (d_out, d_out) per linear layer
        diagonal_fisher   sum_n v_n * v_n      its shape      per parameter
        block_fisher      sum_n v_n v_n^T      (d, d)         per vector parameter

    batches: mappings, tuples or tensors with the examples in the leading dimension, moved to the
        model's device. An iterable that can be read again, or a function that returns one; a plain
        iterator serves for one pass without probing. A mapping may have "example_numbers", (n,)
        integers: which examples of the whole data these are, where it is collected in parts; else
        they are counted from 0. Draws depend on them; the model does not see them.
    loss: one of "causal-lm", "masked-lm", "token-classification", "sequence-classification",
        "image-classification", "seq2seq", "embedding", or a function (model, batch) that returns a
        `Prediction`, or per-example losses (n,). Not needed for input_gram alone.
    layers: globs or a function over module names: whose Gram matrices and parameters are collected.
        A glob may match a whole name or its end. parameters: the same over parameter names, for the
        Fishers.
    labels: "true" draws `samples` labels per prediction from the model; "exact" takes the
        expectation over all classes (one backward pass per class); "empirical" takes the batch's
        labels. The draws depend on `seed` and the example's number alone.
    mask: name of the batch's (n, positions) mask, a function (batch, layer name) -> mask, or None
        to count every position.
    max_tokens: stop after the batch that reaches so many unmasked positions.
    max_dim: matrices of a larger dimension are left out, with a note in the header.
    memory_limit: bytes for the fp64 accumulators; where they do not fit, groups of layers take a
        pass each. None: half of the memory that the model leaves on its device, at least the
        largest accumulator.
    share_inputs: keep one input Gram for layers that read the same tensor (q, k and v; gate and
        up).
    autocast: run the model under autocast of this dtype. loss_scale: multiplies the loss in the
        backward pass and is taken out of the gradients again, against underflow in fp16.
    eval_mode: put the model into eval mode meanwhile. transformers checkpoints activations in
        training mode only.
    out: write a statistics file and return a reader of it. overwrite: replace the statistics file
        that has this name. checkpoint_every: write what there is every so many batches, beside
        `out`; `resume=True` continues from there.
    rename: from the names of modules and parameters to those that the statistics, and `layers`,
        shall use.

    Returns `Statistics`. Raises ValueError and TypeError for arguments that make no sense,
    TypeError for a model or a batch with tensors whose values are not in their memory (DTensor,
    meta, ...), FileExistsError where `out` exists and is not a statistics file or not to be
    replaced, OutputError where it cannot be written (before any work, as far as that can be
    known; DiskFullError), RuntimeError where gradients do not reach a layer, FloatingPointError
    where a batch gives NaN or infinity. The model comes back as it was.
    """
    options = _checked_options(
        kinds,
        loss,
        labels,
        samples,
        seed,
        mask,
        max_tokens,
        autocast,
        loss_scale,
        checkpoint_every,
        progress,
    )
    check_flags(share_inputs=share_inputs, eval_mode=eval_mode, overwrite=overwrite, resume=resume)
    if not isinstance(model_name, str):
        raise TypeError(f"{argument('model_name')} is {type_of(model_name)}; pass a str")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type_of(model)}; pass a torch.nn.Module")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        check_readable(f"model: {name!r}", tensor)
    _check_integer("max_dim", max_dim, 1)
    _check_integer("memory_limit", memory_limit, 1)
    if checkpoint_every is not None and out is None:
        raise ValueError(
            f"{argument('checkpoint_every')} needs {argument('out')}, the file to write beside"
        )
    file = None if out is None else writable(Path(out), overwrite=overwrite)
    chosen = name_filter("layers", layers), name_filter("parameters", parameters)
    source = Source(batches)
    products: dict[str, bool] = {}
    if {"input_gram", "output_grad_gram"} & {*options.kinds} and candidates(model):
        first = to_device(source.first(), model_device(model))
        with _prepared(model, eval_mode):
            products = products_of(model, lambda: _forward_once(options, model, first))
    targets = find_targets(
        model, rename or str, options.kinds, *chosen, max_dim, products, parts_of(model)
    )
    if not targets.keys:
        asked = {"kinds": tuple(kinds), "layers": layers, "parameters": parameters}
        said = ", ".join(
            argument(name, value) for name, value in asked.items() if value is not None
        )
        raise ValueError(
            f"nothing to collect: no layer or parameter of the {type(model).__name__} fits {said}"
            + (f"; {len(targets.skipped)} are above max_dim={max_dim}" if targets.skipped else "")
        )
    with _prepared(model, eval_mode):
        leaders: dict[str, str] = {}
        if share_inputs and "input_gram" in options.kinds:
            leaders = _find_leaders(model, targets, source.first(), options)
        for layer, leader in leaders.items():
            del targets.keys[f"input_gram/{layer}"]
            for alias, key in list(targets.aliases.items()):
                if key == f"input_gram/{layer}":
                    targets.aliases[alias] = f"input_gram/{leader}"
            targets.aliases[f"input_gram/{layer}"] = f"input_gram/{leader}"
        limit = default_limit(model, targets) if memory_limit is None else memory_limit
        groups = plan_passes(targets, limit)
        if len(groups) > 1 and not source.repeatable:
            raise ValueError(
                f"{argument('memory_limit', limit)} asks for {len(groups)} passes, but batches is"
                " an iterator that can be read once; pass a list, a DataLoader, or a function that"
                " returns an iterator"
            )
        collection = Collection(model, targets, leaders, options, source, groups, model_name)
        if file is None:
            return collection.in_memory()
        return collection.to_file(file, resume, overwrite)


def _check_integer(name: str, value: object, least: int | None = None) -> None:
    """TypeError or ValueError that names the argument; None stands for a default."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument(name, value)} is {type_of(value)}; pass an int")
    if least is not None and value < least:
        raise ValueError(f"{argument(name, value)} is below {least}; pass {least} or more")


def _checked_options(
    kinds: Sequence[str],
    loss: str | Loss | None,
    labels: str,
    samples: int,
    seed: int,
    mask: Mask,
    max_tokens: int | None,
    autocast: torch.dtype | None,
    loss_scale: float,
    checkpoint_every: int | None,
    progress: Callable[[Progress], None] | None,
) -> Options:
    if isinstance(kinds, str):
        kinds = (kinds,)
    if not isinstance(kinds, (Sequence, Set)):
        raise TypeError(f"{argument('kinds')} is {type_of(kinds)}; pass a list")
    for name, function in (("loss", loss), ("mask", mask), ("progress", progress)):
        is_name = isinstance(function, str) and name != "progress"
        if not (function is None or is_name or callable(function)):
            raise TypeError(f"{argument(name)} is {type_of(function)}; pass a function")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(
                f"{argument('kinds')} has {shown(kind)}; allowed are {', '.join(map(repr, KINDS))}"
            )
    if not kinds:
        raise ValueError(
            f"{argument('kinds')} is empty; pass some of {', '.join(map(repr, KINDS))}"
        )
    if not isinstance(labels, str) or labels not in LABELS:
        raise ValueError(
            f"{argument('labels', labels)} is not one of {', '.join(map(repr, LABELS))}"
        )
    for name, value in (
        ("samples", samples),
        ("max_tokens", max_tokens),
        ("checkpoint_every", checkpoint_every),
    ):
        _check_integer(name, value, 1)
    for name, value in (("samples", samples), ("seed", seed)):
        if value is None:
            raise TypeError(f"{argument(name)} is None; pass an int")
    _check_integer("seed", seed)
    if autocast is not None and not isinstance(autocast, torch.dtype):
        raise TypeError(f"autocast={shown(autocast)} is not a torch.dtype; pass torch.bfloat16")
    loss_scale = _number("loss_scale", loss_scale)
    if loss_scale <= 0:
        raise ValueError(f"{argument('loss_scale', loss_scale)} is not positive")
    if loss is None and any(kind in GRADIENT_KINDS for kind in kinds):
        raise ValueError(
            f"{argument('kinds', tuple(kinds))} needs gradients, hence a loss; pass"
            f" {argument('loss')}, or {argument('kinds', ('input_gram',))} alone"
        )
    name = (
        loss
        if isinstance(loss, str)
        else getattr(loss, "__qualname__", type(loss).__name__)
        if loss
        else ""
    )
    return Options(
        kinds=tuple(dict.fromkeys(kinds)),
        loss=named_loss(loss) if isinstance(loss, str) else loss,
        loss_name=name,
        labels=labels,
        samples=samples,
        seed=seed,
        mask=mask,
        max_tokens=max_tokens,
        autocast=autocast,
        loss_scale=loss_scale,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )


@contextmanager
def _prepared(model: nn.Module, eval_mode: bool) -> Iterator[None]:
    """The model in eval mode; its modes, requires_grad flags and gradients restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    states = {
        parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    }
    if eval_mode:
        model.eval()
    try:
        # Inference tensors have no gradients, nor do they tell whether they were changed.
        with torch.inference_mode(False), plain_forward(model):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, (flag, grad) in states.items():
            parameter.requires_grad_(flag)
            parameter.grad = grad


def _forward_once(options: Options, model: nn.Module, batch: Any) -> None:
    with torch.no_grad(), autocast_of(options, batch, model):
        forward_only(options, model, batch)


def _find_leaders(
    model: nn.Module, targets: Targets, batch: Any, options: Options
) -> dict[str, str]:
    """Which layers read the same input tensor as an earlier one, by one forward pass over the first
    batch.
    """
    shared = SharedInputs()
    calls: dict[str, list[str]] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
            if x is not None:
                calls.setdefault(name, []).append(shared.leader(x, name))

        return hook

    for name, layer in targets.layers.items():
        if f"input_gram/{name}" in targets.keys:
            for module in layer.modules:
                if convolution_shape(module) is not None:
                    continue  # sees windows of its input
                handles.append(module.register_forward_pre_hook(watch(name), with_kwargs=True))
    try:
        _forward_once(options, model, to_device(batch, model_device(model)))
    finally:
        for handle in handles:
            handle.remove()
    leaders = {}
    for name, seen in calls.items():
        leader = seen[0]
        if leader != name and set(seen) == {leader} and calls[leader] == [leader] * len(seen):
            if targets.layers[leader].d_in == targets.layers[name].d_in:
                leaders[name] = leader
    return leaders
