"""Other implementations, where installed, of what `pymerge bench` merges, as functions of the same
tensors with the same meaning. What is drawn at random has its own masks in each of them.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pymerge.bench.cases import DENSITY, Tensors
from pymerge.checkpoint.files import MAX_CONFIG, read_bounded, reason

Peer = Callable[[Tensors], torch.Tensor]
# By merges of cases.MERGES: the method, its options, and those of each model.
_MERGEKIT: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "ties": ("ties", {"normalize": True, "rescale": False}, {}),
    "linear": ("task_arithmetic", {"normalize": False, "rescale": False}, {}),
    "weights": ("ties", {"normalize": True, "rescale": False}, {"weight": 0.7}),
    "breadcrumbs": ("breadcrumbs", {"normalize": False, "rescale": False}, {"gamma": 0.01}),
    "dare-linear": ("dare_linear", {"normalize": False, "rescale": True}, {}),
    "dare-ties": ("dare_ties", {"normalize": True, "rescale": True}, {}),
    "ties-l1": ("ties", {"normalize": True, "rescale": True}, {}),
}
# And peft's function, and its options.
_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "ties": ("ties", {"density": DENSITY}),
    "linear": ("task_arithmetic", {}),
    "count": ("ties", {"density": DENSITY, "majority_sign_method": "frequency"}),
    "dare-linear": ("dare_linear", {"density": DENSITY}),
    "dare-ties": ("dare_ties", {"density": DENSITY}),
}
_OFFICIAL_FUNCTIONS = {"topk_values_mask", "resolve_zero_signs", "resolve_sign", "disjoint_merge"}


def available(merge: str, official: Peer | None = None) -> dict[str, Peer]:
    """Name -> function, for one of cases.MERGES; `official` is what `read_official` gave."""
    peers: dict[str, Peer] = {}
    if official is not None and merge == "ties":
        peers["official TIES code"] = official
    if merge in _PEFT and importlib.util.find_spec("peft") is not None:
        peers["peft"] = _peft(*_PEFT[merge])
    if merge in _MERGEKIT and importlib.util.find_spec("mergekit") is not None:
        peers["mergekit"] = _mergekit(*_MERGEKIT[merge])
    return peers


def _peft(name: str, options: dict[str, Any]) -> Peer:
    def peft(tensors: Tensors) -> torch.Tensor:
        from peft.utils import merge_utils

        deltas = [m - tensors.base for m in tensors.models]
        merged = getattr(merge_utils, name)(deltas, tensors.base.new_ones(len(deltas)), **options)
        result: torch.Tensor = tensors.base + merged
        return result

    return peft


def _mergekit(method: str, options: dict[str, Any], of_models: dict[str, float]) -> Peer:
    def mergekit(tensors: Tensors) -> torch.Tensor:
        from mergekit import merge_methods
        from mergekit.merge_methods.base import PerInputValues, TensorGroup

        ids = list(range(len(tensors.models) + 1))
        group = TensorGroup.from_tensors([tensors.base, *tensors.models], ids=ids, base_index=0)
        each = {"weight": 1.0, "density": DENSITY, **of_models}
        if method == "task_arithmetic":
            del each["density"]
        merged: torch.Tensor = merge_methods.get(method).merge_group(
            group,
            **{name: PerInputValues([(i, x) for i in ids[1:]]) for name, x in each.items()},
            **{"int8_mask": False, "lambda": 1.0, **options},
        )
        return merged

    return mergekit


def read_official(path: Path) -> Peer:
    """The four functions of src/utils/merge_utils.py of a checkout of the TIES-Merging repository,
    without the imports that it needs for other purposes. Raises ValueError for any other file.
    """
    try:
        tree = ast.parse(read_bounded(path, MAX_CONFIG))
    except OSError as error:
        raise ValueError(f"{path} {reason(error)}; pass the repository's merge_utils.py") from None
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        why = getattr(error, "msg", None) or error or "too deeply nested"
        raise ValueError(
            f"{path} is no Python file ({why}); pass the repository's merge_utils.py"
        ) from None
    wanted: list[ast.stmt] = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name in _OFFICIAL_FUNCTIONS
    ]
    missing = _OFFICIAL_FUNCTIONS - {getattr(node, "name", "") for node in wanted}
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(sorted(missing))}; pass the repository's merge_utils.py"
        )
    scope: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), scope)

    def official(tensors: Tensors) -> torch.Tensor:
        stacked = torch.stack([m - tensors.base for m in tensors.models])
        trimmed, *_ = scope["topk_values_mask"](stacked, K=DENSITY, return_mask=False)
        signs = scope["resolve_sign"](trimmed, "mass")
        merged: torch.Tensor = scope["disjoint_merge"](trimmed, "dis-mean", signs)
        return tensors.base + merged

    return official
