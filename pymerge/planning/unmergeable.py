"""Models that no elementwise arithmetic can merge, recognised by names, shapes, dtypes and config:
quantised weights, which are codes and scales, and adapters, whose factors form an update as a
product.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pymerge.checkpoint.types import ModelHeader, TensorInfo
from pymerge.dtypes import INTEGERS, MERGEABLE
from pymerge.messages.words import some_names
from pymerge.recipe.model import TensorTask

# Integer tensors that are not codes: indices and masks.
_PLAIN = (*MERGEABLE, "int64", "uint64", "bool")
_CONSTANT = re.compile(
    r"(_ids|_index|_indices|_idxs?|mask|anchors|(^|\.)attn\.bias|(^|\.)masked_bias)$"
)
# Marlin's are `B` beside `s`.
_CODES = re.compile(r"(^|\.)(qweight|qzeros|q_weight|weight_packed|W_q|Qidxs|B)$")
# The last part of names that stand beside codes: `scales`, `weight_scale_inv`, `absmax`, `SCB`.
_SCALES = re.compile(
    r"(^|_)(q?scales?|s|scb|absmax|quant_map|q?zeros?|zero_points?|codebooks?|centroids|invperm|suh)"
    r"(_|$)",
    re.I,
)
_WEIGHT = (".weight", ".kernel")
# Of peft (LoRA, DoRA, AdaLoRA, VeRA, OFT), kohya, diffusers and LyCORIS. (IA)^3 is not among them:
# its vectors are no factors of one another.
_FACTOR = re.compile(
    r"(?:^|[._])("
    r"lora_(?:A|B|E|down|up|mid|embedding_A|embedding_B|magnitude_vector)|lora\.(?:down|up)"
    r"|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|dora_scale|vera_lambda_[bd]"
    r"|oft_(?:blocks|diag|R|r)|boft_[RS])(?=[._]|$)",
    re.M,
)

_HOLDS = "holds an adapter, not a model"


def refusals(headers: Sequence[ModelHeader], tasks: Iterable[TensorTask]) -> list[str]:
    """A problem for every model among the tasks' that cannot be merged. Tensors that are only
    copied may be of any kind.
    """
    merged = {
        source.model
        for task in tasks
        if task.options is not None or task.solve is not None or len(task.sources) > 1
        for source in (*task.sources, *([] if task.base is None else [task.base]))
    }
    found = [(headers[m].reference, why_unmergeable(headers[m])) for m in sorted(merged)]
    return [f"model {reference} {why}" for reference, why in found if why]


def why_unmergeable(header: ModelHeader) -> str | None:
    """The predicate of a sentence about the model; None where its tensors are weights."""
    return _adapter(header.tensors) or _quantised(header)


def holds_adapter(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether most tensors are an adapter's."""
    return (_adapter(tensors) or "").startswith(_HOLDS)


def is_quantised(header: ModelHeader) -> bool:
    """Whether the tensors confirm what a model declares of quantised weights."""
    return _quantised(header) is not None


def declares(key: str, value: object) -> bool:
    """Whether a config entry describes quantised weights: that of transformers, of
    compressed-tensors, of MLX. Vector quantisation is something else.
    """
    if key == "quantization":
        return isinstance(value, Mapping) and "bits" in value
    return key in ("quantization_config", "compression_config") and bool(value)


def declared(config: Mapping[str, Any]) -> Iterator[str]:
    """The keys by which a config, nested ones included, declares its model quantised."""
    for key, value in config.items():
        if declares(key, value):
            yield key
        elif isinstance(value, Mapping) and key.endswith("_config"):
            yield from declared(value)


def _quantised(header: ModelHeader) -> str | None:
    codes = {
        name: info
        for name, info in header.tensors.items()
        if info.dtype not in _PLAIN and info.shape and not _CONSTANT.search(name)
    }
    if not codes:
        return None
    why = _packed(codes, header.tensors)
    if why is None:
        declarations = [f"its config has a {key}" for key in declared(header.config)]
        declarations += [f"it has a {name}" for name in header.quantisation_files]
        if not declarations:
            return None
        name, info = next(iter(codes.items()))
        why = f"{declarations[0]}, and {name} is {info.dtype}"
    return (
        f"is quantized ({why}): codes and scales cannot be averaged; merge the models that it was"
        " made from, or dequantize it first"
    )


def _packed(codes: Mapping[str, TensorInfo], tensors: Iterable[str]) -> str | None:
    """Why the tensors are codes, by the first one whose name or neighbours show it."""
    beside: dict[str, list[str]] = {}  # module -> the last parts of its tensors' names
    for name in tensors:
        module, _, last = name.rpartition(".")
        if _SCALES.search(last):
            beside.setdefault(module, []).append(name)
    for name, info in codes.items():
        module = name.rpartition(".")[0]
        # `q_proj.scales` beside `q_proj.qweight`, `q_proj.weight.absmax` beside `q_proj.weight`.
        scales = [each for each in (*beside.get(module, ()), *beside.get(name, ())) if each != name]
        if scales and len(info.shape) > 1:
            return f"{name} is {info.dtype}, beside {scales[0]}"
        # No module has a matrix of small integers for its weight, whatever stands beside it.
        whole = info.dtype in INTEGERS and len(info.shape) > 1 and name.endswith(_WEIGHT)
        if whole or _CODES.search(name):
            return f"{name} is {info.dtype}"
    return None


def _adapter(tensors: Mapping[str, TensorInfo]) -> str | None:
    if _FACTOR.search("\n".join(tensors)) is None:
        return None
    words: dict[str, set[str]] = {}  # module -> which factors of it there are
    factors: dict[str, None] = {}
    for name in tensors:
        found = _FACTOR.search(name)
        if found is not None:
            factors[name] = None
            words.setdefault(name[: found.start(1)], set()).add(found[1])
    # With the numbers beside them, as kohya's `alpha`.
    own = sum(name.rpartition(".")[0] + "." in words or name in factors for name in tensors)
    mostly = 2 * own > len(tensors)
    if not mostly and all(len(each) == 1 for each in words.values()):
        return None
    what = _HOLDS if mostly else "has LoRA layers beside its weights"
    way = "" if not mostly else "name it with its base in a recipe, as base+adapter, or "
    return (
        f"{what} ({some_names(factors)}): an update is the product of its factors, and merging"
        f" these one by one makes another one; {way}merge the adapter into its model first (peft:"
        " merge_and_unload) and name the result"
    )
