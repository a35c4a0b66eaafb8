"""Other implementations of TIES, where installed, as functions of (models, base) with the same
meaning.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pymerge.bench.cases import DENSITY, Tensors

_OFFICIAL_FUNCTIONS = {"topk_values_mask", "resolve_zero_signs", "resolve_sign", "disjoint_merge"}


def available(official: Path | None) -> dict[str, Callable[[Tensors], torch.Tensor]]:
    """Name -> function; `official` is the file src/utils/merge_utils.py of a checkout of the
    TIES-Merging repository.
    """
    peers: dict[str, Callable[[Tensors], torch.Tensor]] = {}
    if official is not None:
        peers["official TIES code"] = _official(official)
    if importlib.util.find_spec("peft") is not None:
        peers["peft"] = _peft
    if importlib.util.find_spec("mergekit") is not None:
        peers["mergekit"] = _mergekit
    return peers


def _peft(tensors: Tensors) -> torch.Tensor:
    from peft.utils.merge_utils import ties

    deltas = [m - tensors.base for m in tensors.models]
    merged = ties(deltas, tensors.base.new_ones(len(deltas)), DENSITY)
    result: torch.Tensor = tensors.base + merged
    return result


def _mergekit(tensors: Tensors) -> torch.Tensor:
    from mergekit import merge_methods
    from mergekit.merge_methods.base import PerInputValues, TensorGroup

    ids = list(range(len(tensors.models) + 1))
    group = TensorGroup.from_tensors([tensors.base, *tensors.models], ids=ids, base_index=0)
    merged: torch.Tensor = merge_methods.get("ties").merge_group(
        group,
        weight=PerInputValues([(i, 1.0) for i in ids[1:]]),
        density=PerInputValues([(i, DENSITY) for i in ids[1:]]),
        normalize=True,
        rescale=False,
        int8_mask=False,
        **{"lambda": 1.0},
    )
    return merged


def _official(path: Path) -> Callable[[Tensors], torch.Tensor]:
    """The four functions of the official file, without the imports that it needs for other
    purposes.
    """
    tree = ast.parse(path.read_text())
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
