"""Linear maps that no `torch.nn.Linear` computes: routers, experts in one 3-D parameter (S1).

They are found where they are used: a product of an input with a parameter, or with a slice of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pymerge.statistics._targets import Targets, linear_shape

# (parameter, place of the slice or None for all of it, whether it is stored (d_in, d_out), input,
# output) -> what to go on with, None for the output itself.
Called = Callable[
    [nn.Parameter, "int | None", bool, torch.Tensor, torch.Tensor], "torch.Tensor | None"
]

_PRODUCTS = {
    functional.linear: False,
    torch.matmul: True,
    torch.Tensor.matmul: True,
    torch.Tensor.__matmul__: True,
    torch.mm: True,
    torch.Tensor.mm: True,
    torch.bmm: True,
    torch.Tensor.bmm: True,
}
_OF_OTHERS = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.conv._ConvNd)


def candidates(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of two and three dimensions that may be used in products, by name."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, _OF_OTHERS) or linear_shape(module) is not None:
            continue
        for local, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() in (2, 3) and parameter.numel():
                found[f"{prefix}.{local}" if prefix else local] = parameter
    held = {id(p) for p in found.values()}
    for module in model.modules():  # tied to a layer that has hooks of its own
        if linear_shape(module) is not None:
            held.discard(id(module.weight))
    return {name: p for name, p in found.items() if id(p) in held}


class Watch(TorchFunctionMode):
    """Calls `called` for every product with one of `parameters`, and remembers which rows were
    gathered last.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], called: Called) -> None:
        super().__init__()
        self._called = called
        self._held = {p.untyped_storage().data_ptr(): p for p in parameters.values()}
        self.rows: torch.Tensor | None = None
        self.gathered_from = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            self._gathered(*args)
        elif func in _PRODUCTS and len(args) > 1 and isinstance(out, torch.Tensor):
            x, w = args[:2]
            parameter = self._held.get(w.untyped_storage().data_ptr())
            if parameter is not None and parameter is not x:
                place = _slice_of(parameter, w)
                if place is not None:
                    index, turned = place
                    changed = self._called(parameter, index, _PRODUCTS[func] != turned, x, out)
                    out = out if changed is None else changed
        return out

    def _gathered(self, x: torch.Tensor, index: Any) -> None:
        """Experts take the rows of the tokens that are routed to them."""
        if isinstance(index, torch.Tensor) and index.dim() == 1 and x.dim() == 2:
            if index.dtype in (torch.int32, torch.int64):
                self.rows, self.gathered_from = index, x.shape[0]
            elif index.dtype == torch.bool:
                self.rows, self.gathered_from = index.nonzero().squeeze(1), x.shape[0]


def _slice_of(parameter: nn.Parameter, w: torch.Tensor) -> tuple[int | None, bool] | None:
    """(which slice of a 3-D parameter `w` is, None for the whole; whether it is transposed)."""
    if w.dim() < 2 or w.dim() > parameter.dim() or w.dtype != parameter.dtype:
        return None
    rows, columns = parameter.shape[-2:]
    shapes = {
        (rows, columns, *parameter.stride()[-2:]): False,
        (columns, rows, *parameter.stride()[:-3:-1]): True,
    }
    turned = shapes.get((*w.shape[-2:], *w.stride()[-2:]))
    if turned is None:
        return None
    offset = w.storage_offset() - parameter.storage_offset()
    if w.dim() == parameter.dim():
        return (None, turned) if offset == 0 and w.shape[:-2] == parameter.shape[:-2] else None
    step = parameter.stride(0)
    return (offset // step, turned) if offset >= 0 and offset % step == 0 else None


def watch_of(model: nn.Module, targets: Targets, called: Called) -> Watch | None:
    """For a pass over a model: None where there are neither such parameters nor experts."""
    own = {name: p for name, p in model.named_parameters() if id(p) in targets.functional}
    routed = any(".experts." in name for name in targets.layers)
    return Watch(own, called) if own or routed else None


def products_of(model: nn.Module, run: Callable[[], None]) -> dict[str, bool]:
    """Which parameters products take directly in a forward pass `run` -> whether they are stored
    (d_in, d_out); in the model's order.
    """
    possible = candidates(model)
    if not possible:
        return {}
    seen: dict[int, bool] = {}

    def called(
        parameter: nn.Parameter,
        place: int | None,
        transposed: bool,
        x: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        seen.setdefault(id(parameter), transposed)

    with Watch(possible, called):
        run()
    return {name: seen[id(p)] for name, p in possible.items() if id(p) in seen}


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """transformers' experts one by one, as they are written, and not through grouped products."""
    before: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        current = getattr(config, "_experts_implementation", None)
        if current is not None and id(config) not in seen:
            seen.add(id(config))
            before.append((config, current))
            config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, current in before:
            config._experts_implementation = current


def parts_of(model: nn.Module) -> Callable[[str], int]:
    """Of how many matrices, one below the other, the slices of a fused parameter are made when it
    is stored: 2 for the gates and up-projections of most experts. By the library's own table.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        table = get_model_conversion_mapping(model)
    except Exception:  # another library's model, or an older transformers
        return lambda name: 1
    fused = {}
    for entry in table:
        operations = [type(each).__name__ for each in getattr(entry, "operations", ())]
        if operations[:2] == ["MergeModulelist", "Concatenate"]:
            for target in entry.target_patterns:
                fused[target.split(".")[-1].strip("$")] = len(entry.source_patterns)
    return lambda name: fused.get(name.split(".")[-1], 1)
