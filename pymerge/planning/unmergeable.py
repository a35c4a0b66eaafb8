"""Models that cannot be merged element by element, recognised by names, shapes, dtypes and config:
quantised weights, which are codes and scales, and adapters, whose update is a product of factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pymerge.checkpoint.types import ModelHeader, TensorInfo
from pymerge.messages.words import some_names
from pymerge.ops.weights import HOLDS_ADAPTER, codes_in, quantised, why_adapter, why_codes
from pymerge.recipe.model import TensorTask


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
    return why_adapter(header.tensors) or _quantised(header) or _numbers(header)


def holds_adapter(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether most tensors are an adapter's."""
    return (why_adapter(tensors) or "").startswith(HOLDS_ADAPTER)


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


def _numbers(header: ModelHeader) -> str | None:
    if not header.tensors or any(info.shape for info in header.tensors.values()):
        return None
    return (
        f"holds no tensors of a model, only single numbers ({some_names(header.tensors)}); name the"
        " weights, or what holds them"
    )


def _quantised(header: ModelHeader) -> str | None:
    codes = codes_in(header.tensors)
    if not codes:
        return None
    why = why_codes(codes, header.tensors)
    if why is None:
        declarations = [f"its config has a {key}" for key in declared(header.config)]
        declarations += [f"it has a {name}" for name in header.quantisation_files]
        if not declarations:
            return None
        name, info = next(iter(codes.items()))
        why = f"{declarations[0]}, and {name} is {info.dtype}"
    return quantised(why)
