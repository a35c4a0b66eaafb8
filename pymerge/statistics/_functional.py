"""Linear maps that no call of a `torch.nn.Linear` gives: routers, experts in one parameter (S1).

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
    others = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _OF_OTHERS)
        for parameter in module._parameters.values()
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() in (2, 3)
        and parameter.numel()
        and parameter.is_floating_point()
        and id(parameter) not in others
    }


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
            left = _PRODUCTS[func] and x.untyped_storage().data_ptr() in self._held
            if left and w.dim() > 1 and out.dim() > 1:  # W X, of columns
                return self._product(x, False, w.mT, out.mT).mT
            out = self._product(w, _PRODUCTS[func], x, out)
        return out

    def _product(
        self, w: torch.Tensor, transposed: bool, x: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """What to go on with, where `w` may be one of the parameters, (d_in, d_out) if
        `transposed`.
        """
        parameter = self._held.get(w.untyped_storage().data_ptr())
        place = None if parameter is None or parameter is x else _slice_of(parameter, w)
        if parameter is None or place is None:
            return out
        index, turned = place
        changed = self._called(parameter, index, transposed != turned, x, out)
        return out if changed is None else changed

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
    (d_in, d_out); in the model's order. Not the weights of modules that give just their product,
    which have hooks; but of routers that are linear layers and give more, and of those whose weight
    alone is used.
    """
    possible = candidates(model)
    seen: dict[int, bool] = {}
    hooked: set[int] = set()

    def gave(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            hooked.add(id(module.weight))

    def called(
        parameter: nn.Parameter,
        place: int | None,
        transposed: bool,
        x: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        seen.setdefault(id(parameter), transposed)

    handles = [
        module.register_forward_hook(gave)
        for module in model.modules()
        if linear_shape(module) is not None
    ]
    try:
        with Watch(possible, called):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: seen[id(p)] for name, p in possible.items() if id(p) in seen and id(p) not in hooked
    }


# What transformers' models compute otherwise while their statistics are collected: experts one by
# one, as they are written, and not through grouped products; and nothing is kept for a next token,
# which takes memory, and which RWKV writes into what the backward pass needs.
_SETTINGS = {"_experts_implementation": "eager", "use_cache": False}


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """Models of transformers set to compute what is looked at and no more."""
    before: list[tuple[Any, str, Any]] = []
    seen: set[int] = set()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is None or id(config) in seen:
            continue
        seen.add(id(config))
        for name, value in _SETTINGS.items():
            current = getattr(config, name, None)
            if current is not None:
                before.append((config, name, current))
                setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, current in before:
            setattr(config, name, current)


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
