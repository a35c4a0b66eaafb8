"""One layer of `mats`: checks, working copies, initialisation, the numbers of its report (M4, N1,
N2, E1, E2).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pymerge.errors import NonFiniteError
from pymerge.messages.arguments import checked_options, renamed
from pymerge.messages.words import counted, shown, some_names, type_of
from pymerge.ops.mats.system import full_products
from pymerge.ops.tensors import check_floats, check_list
from pymerge.rules.mats import INITS, vector_length
from pymerge.rules.ties import _choice, _number
from pymerge.rules.types import InitName

Init = InitName | torch.Tensor

# N5 and E2: what rounding cannot do to a diagonal, relative to its largest, and to symmetry.
_NEGATIVE, _ASYMMETRIC = 1e-6, 1e-3


@dataclass
class MatsLayer:
    """One layer for `mats_many`: the arguments of `mats` that are tensors.

    weights: K tensors (d_out, d_in), or (d,), perhaps with further dimensions of 1. input_grams: K
        tensors (d_in, d_in), or one (K, d_in, d_in).
    output_grams: the same with d_out, or None. base: the pretrained weight, for the initialisations
        that need it.
    init: a name of docs/spec/mats.md, M4, or a tensor. Layers that are given the very same
        `input_grams` object share its memory.
    """

    weights: Sequence[torch.Tensor]
    input_grams: Sequence[torch.Tensor] | torch.Tensor
    output_grams: Sequence[torch.Tensor] | torch.Tensor | None = None
    base: torch.Tensor | None = None
    init: Init = "average"
    init_options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


def to_device(layer: MatsLayer, device: torch.device, copies: dict[int, Any]) -> MatsLayer:
    """The layer on a device. copies: of Gram matrices that were copied before, filled here, so that
    layers that share them share one copy.
    """

    def grams(given: Any) -> Any:
        if given is None:
            return None
        if id(given) not in copies:
            whole = isinstance(given, torch.Tensor)
            copies[id(given)] = given.to(device) if whole else [g.to(device) for g in given]
        return copies[id(given)]

    return replace(
        layer,
        weights=[w.to(device) for w in layer.weights],
        input_grams=grams(layer.input_grams),
        output_grams=grams(layer.output_grams),
        base=None if layer.base is None else layer.base.to(device),
        init=layer.init.to(device) if isinstance(layer.init, torch.Tensor) else layer.init,
    )


@dataclass
class Prepared:
    """A checked layer: start X0 and weights (K, d_out, d_in) in the working dtype, statistics as
    given.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    weights: torch.Tensor
    start: torch.Tensor
    input_grams: torch.Tensor
    output_grams: torch.Tensor | None
    bad: str
    negative: str
    sharing: int

    @property
    def key(self) -> tuple[Any, ...]:
        """Layers with equal keys can be stacked."""
        return (
            tuple(self.weights.shape),
            self.output_grams is not None,
            self.weights.device,
        )


def prepare(layer: MatsLayer, work: torch.dtype, stacked: dict[int, torch.Tensor]) -> Prepared:
    """Check a layer whose weights passed `check_tensors`, and convert it to the working dtype.
    `stacked` caches stacked Gram matrices across layers.
    """
    weights = list(layer.weights)
    check_init(layer)
    first = weights[0]
    length = vector_length(first.shape) if first.ndim != 2 else None
    if first.ndim != 2 and length is None:
        raise ValueError(
            f"weights have shape {tuple(first.shape)}; pass matrices (d_out, d_in) or vectors (d,)"
        )
    if length is not None and layer.output_grams is not None:
        raise ValueError(
            "output_grams are given for vectors (d,); pass their (d, d) statistics as input_grams"
        )
    rows, d_in = first.shape if length is None else (1, length)
    grams = _stack("input_grams", layer.input_grams, len(weights), d_in, first.device, stacked)
    outputs = None
    if layer.output_grams is not None:
        outputs = _stack(
            "output_grams", layer.output_grams, len(weights), rows, first.device, stacked
        )
    flat = torch.stack([w.detach().to(work).reshape(rows, d_in) for w in weights])
    finite = flat.isfinite().flatten(1).all(1).tolist()
    bad = ""
    if not all(finite):
        which = some_names(f"weights[{k}]" for k, ok in enumerate(finite) if not ok)
        if not any(finite):
            raise ValueError(f"{which} hold NaN or infinity, all of them; mend the models (N2)")
        bad = f"{which}: NaN or infinity"
    start = initial(layer, work, [k for k, ok in enumerate(finite) if not ok])
    negative = ""
    for what, held in (("input_grams", grams), ("output_grams", outputs)):
        if held is not None:
            bad = bad or _bad_statistics(what, held)
            negative = negative or _negative_statistics(what, held)
            if not bad:
                _check_symmetric(what, held)
    return Prepared(
        layer.name,
        first.shape,
        first.dtype,
        flat,
        start.reshape(rows, d_in),
        grams,
        outputs,
        bad,
        negative,
        id(layer.input_grams),
    )


def check_init(layer: MatsLayer) -> None:
    """Check the initialisation as far as possible without its values (M4); `initial` checks
    these.
    """
    init, first = layer.init, layer.weights[0]
    if isinstance(init, torch.Tensor):
        check_floats("init", init, "it")
        if init.shape != first.shape or init.device != first.device:
            raise ValueError(
                f"init has shape {tuple(init.shape)} on {init.device}, the weights"
                f" {tuple(first.shape)} on {first.device}; they must be equal"
            )
        return
    if not isinstance(init, str):
        raise TypeError(
            f"init is {type_of(init)}; pass {', '.join(map(repr, INITS))} or a torch.Tensor"
        )
    _choice("init", init, INITS)
    options = dict(checked_options("init_options", layer.init_options))
    if init in ("average", "zero", "pretrained") and options:
        raise ValueError(f"init_options={shown(options)} are given, but init={init!r} takes none")
    if init in ("pretrained", "task_arithmetic", "ties") and layer.base is None:
        raise ValueError(f"init={init!r} needs the pretrained weight; pass base=")


def initial(layer: MatsLayer, work: torch.dtype, without: Collection[int] = ()) -> torch.Tensor:
    """M4, in the working dtype, for a layer that passed `check_init`. without: models that are left
    out because they are not finite (N2).
    """
    init, base = layer.init, layer.base
    weights = _but(layer.weights, without)
    first = weights[0]
    if isinstance(init, torch.Tensor):
        return _finite("init", init.detach().to(work))
    options = dict(layer.init_options)
    if init == "average":
        return _mean(weights, work)
    if init == "zero":
        return torch.zeros(first.shape, dtype=work, device=first.device)
    assert base is not None
    anchor = _finite("base", base.detach().to(work))
    if init == "pretrained":
        return anchor
    if init == "task_arithmetic":
        scaling = _number("init_options['scaling']", options.pop("scaling", 1.0))
        if options:
            raise ValueError(f"init_options={shown(options)}: task_arithmetic takes only 'scaling'")
        # In the order and with the roundings of the method task_arithmetic, so that both give the
        # same bits.
        total = torch.zeros_like(anchor)
        for w in weights:
            total.add_(w.detach().to(work) - anchor)
        return _finite("init='task_arithmetic'", anchor + total.mul_(scaling))
    from pymerge.ops.ties.api import ties

    if without:
        count = len(layer.weights)
        each = {name: value for name, value in options.items() if _per_model(value, count)}
        options |= {name: _but(value, without) for name, value in each.items()}
    kept = [k for k in range(len(layer.weights)) if k not in without]
    with renamed("init_options", models=[f"weights[{k}]" for k in kept], base="base"):
        # Not in the base's dtype: a bf16 base would round the start.
        return ties([w.detach() for w in weights], anchor, **options)


def rounded(start: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An initialisation in the output's dtype; ValueError where that cannot hold it (M4)."""
    result = start.to(dtype)
    if dtype == torch.float16 and start.dtype != dtype and not bool(result.isfinite().all()):
        count = int((~result.isfinite()).sum())
        raise NonFiniteError(
            f"{counted(count, 'value')} of the initialisation, which is the result here,"
            f" overflow{'s' * (count == 1)} float16;"
            " give the weights a wider dtype (bfloat16, float32), or choose init='average' or a"
            " smaller scaling"
        )
    return result


def _per_model(value: Any, count: int) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 1 and len(value) == count
    return isinstance(value, (list, tuple)) and len(value) == count


def _but(values: Iterable[Any], without: Collection[int]) -> list[Any]:
    return [value for k, value in enumerate(values) if k not in without]


def step_scale(weights: torch.Tensor) -> float:
    """max_k ||W_k - mean W||, (K, d_out, d_in)."""
    return float((weights - weights.mean(0)).flatten(1).norm(dim=1).max())


def step_ratio(step: float, scale: float) -> float:
    """D / `step_scale`; 0 where D is 0."""
    return 0.0 if step == 0 else step / scale if scale > 0 else math.inf


def _mean(weights: Sequence[torch.Tensor], work: torch.dtype) -> torch.Tensor:
    total = weights[0].detach().to(work, copy=True)
    for w in weights[1:]:
        total.add_(w.detach())
    mean = total.div_(len(weights))
    if work == torch.float64 or bool(mean.isfinite().all()):
        return mean
    return _mean(weights, torch.float64).to(work)  # the sum overflowed, which the mean cannot


def _finite(what: str, tensor: torch.Tensor) -> torch.Tensor:
    if not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{what} holds NaN or infinity; it is what a layer falls back to, mend it (N2)"
        )
    return tensor


def _stack(
    what: str,
    grams: Sequence[torch.Tensor] | torch.Tensor,
    count: int,
    d: int,
    device: torch.device,
    stacked: dict[int, torch.Tensor],
) -> torch.Tensor:
    """E2: one (K, d, d) tensor."""
    check_list(grams, None, what)
    if len(grams) != count:
        raise ValueError(
            f"{what} has {counted(len(grams), 'matrix', 'matrices')} for {counted(count, 'model')};"
            " pass one per model"
        )
    for k, gram in enumerate(grams):
        check_floats(f"{what}[{k}]", gram, "mats")
        if gram.shape != (d, d):
            raise ValueError(
                f"{what}[{k}] has shape {tuple(gram.shape)}; the weights' shape asks for ({d}, {d})"
            )
        if gram.device != device:
            raise ValueError(
                f"{what}[{k}] is on {gram.device}, the weights on {device}; move all to one device"
            )
    if id(grams) in stacked:
        return stacked[id(grams)]
    if isinstance(grams, torch.Tensor):
        result = grams.detach()
    else:
        widest = torch.float64 if any(g.dtype == torch.float64 for g in grams) else torch.float32
        result = torch.stack([g.detach().to(widest) for g in grams])
    stacked[id(grams)] = result
    return result


def _bad_statistics(what: str, grams: torch.Tensor) -> str:
    """N1: why statistics are unusable: they are empty, or which models' are not finite."""
    if bool(grams.sum().isfinite()):  # a single pass: a finite sum has finite terms only
        return ""
    which = [f"{what}[{k}]" for k, gram in enumerate(grams) if not bool(gram.isfinite().all())]
    return f"{some_names(which)}: NaN or infinity" if which else ""


def _negative_statistics(what: str, grams: torch.Tensor) -> str:
    """N5: empty, or which models' statistics have a negative diagonal."""
    diagonals = grams.diagonal(dim1=-2, dim2=-1)
    if not diagonals.numel() or bool(diagonals.amin() >= 0):
        return ""
    least = diagonals.amin(-1) < -_NEGATIVE * diagonals.abs().amax(-1)
    which = [f"{what}[{k}]" for k, found in enumerate(least.tolist()) if found]
    return f"{some_names(which)}: a negative diagonal, no Gram matrix" if which else ""


def _check_symmetric(what: str, grams: torch.Tensor) -> None:
    """E2, at the cost of reading the matrices twice: G v and G^T v of symmetric ones are equal."""
    count, d = grams.shape[:2]
    work = torch.promote_types(grams.dtype, torch.float32)
    signs = 1 - 2 * (torch.arange(d, dtype=torch.int64, device=grams.device) ** 2 // 3 % 2)
    probe = signs.to(work)
    with full_products(grams.device):
        for k in range(count):
            gram = grams[k].to(work)
            apart = (gram @ probe - probe @ gram).abs().amax() if d else gram.sum()
            if bool(apart > _ASYMMETRIC * torch.linalg.matrix_norm(gram)):
                upper = not bool(gram.tril(-1).any()) or not bool(gram.triu(1).any())
                raise ValueError(
                    f"{what}[{k}] is {'a triangle' if upper else 'not symmetric'}; pass the whole"
                    f" symmetric matrix{', G + G.T - diag(G)' if upper else ''}"
                )
