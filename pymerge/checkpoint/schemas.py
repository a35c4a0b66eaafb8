"""Schemas of the JSON that this package writes and reads again: statistics headers and merge
manifests.

With a schema, a damaged file is one error here, not one of many possible errors later.
"""

from __future__ import annotations

import functools
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from pymerge.checkpoint.contents import MANIFEST_FORMAT
from pymerge.checkpoint.files import MAX_INDEX, parse_object
from pymerge.checkpoint.types import TensorInfo
from pymerge.dtypes import elements
from pymerge.errors import CheckpointError
from pymerge.rules import types

STATISTICS_FORMAT = "pymerge.statistics"
STATISTICS_VERSION = "1"
GRAMS = ("input_gram", "output_grad_gram")
KINDS: tuple[types.Kind, ...] = get_args(types.Kind)

_AGAIN = "collect it again"

Natural = Annotated[int, Field(ge=0, lt=1 << 63)]
Size = Annotated[int, Field(ge=0, lt=1 << 31)]
_Plain = str | int | float | bool | None
_Number = Annotated[float | None, Field(allow_inf_nan=True)]


class _Counts(TypedDict):
    tokens: Natural
    examples: Natural
    draws: Natural


class _Layer(TypedDict):
    d_in: Size
    d_out: Size
    transposed: bool
    weight: str
    pool: NotRequired[str]


class _Data(TypedDict):
    digest: str | None
    batches: Natural
    examples: Natural
    tokens: Natural


_Model = TypedDict("_Model", {"name": str | None, "class": str, "fingerprint": str})


class _Progress(TypedDict):
    rows: Natural
    seed: int
    groups: Natural
    layer_tokens: dict[str, Natural]


class _Statistics(TypedDict):
    """docs/spec/statistics.md, S10."""

    model: _Model
    data: list[_Data]
    settings: dict[str, _Plain]
    layers: dict[str, _Layer]
    parameters: dict[str, list[Size]]
    weights: NotRequired[dict[str, str]]
    tensors: dict[str, _Counts]
    aliases: dict[str, str]
    skipped: dict[str, str]
    progress: NotRequired[_Progress]


class _Report(TypedDict):
    """`MatsReport.as_dict`."""

    name: str
    status: str
    solver: str
    iterations: Natural
    residual_start: _Number
    residual_exit: _Number
    objective_decrease: _Number
    damping: _Number
    breakdowns: Natural
    step: _Number
    trace_shares: list[_Number]
    precision: str
    message: str


class _Method(TypedDict):
    """`MethodSummary`."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    tensors: Natural
    elements: Natural
    considered: Natural
    kept: Natural
    conflicts: Natural
    non_finite: Natural
    non_finite_out: Natural
    solved: Natural


class _Output(TypedDict):
    bytes: Natural
    sha256: str
    methods: NotRequired[dict[str, _Method]]
    reports: NotRequired[list[_Report]]


class _Input(TypedDict):
    model: str
    files: list[dict[str, _Plain]]


class _Manifest(TypedDict):
    pymerge: str
    fingerprint: str
    recipe: str
    options: dict[str, _Plain]
    inputs: list[_Input]
    tensors: Natural
    parameters: Natural
    outputs: dict[str, _Output]


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _check(kind: Any, value: Mapping[str, Any]) -> None:
    """Raises ValueError with the first violation of the schema. Fields beyond the schema may be
    anything.
    """
    json.dumps(
        value, ensure_ascii=False
    ).encode()  # raises for half a surrogate pair, which could not be shown
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(
            _short(step) if isinstance(step, str) else str(step) for step in first["loc"]
        )
        raise ValueError(f"{place}: {first['msg']}") from None


def _short(name: str) -> str:
    return repr(name[:60])[1:-1]


def manifest(text: bytes, path: Path) -> dict[str, Any]:
    """The content of a manifest, checked. Raises CheckpointError for one that is damaged or of
    another format.
    """
    content = parse_object(text, path, MAX_INDEX, remedy="it is damaged")
    number = content.get("format")
    if type(number) is not int or number != MANIFEST_FORMAT:
        raise CheckpointError(
            f"{path}: is of format {reprlib.repr(number)}, by pymerge"
            f" {reprlib.repr(content.get('pymerge'))}; this release reads format {MANIFEST_FORMAT}"
        )
    try:
        _check(_Manifest, content)
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from None
    return content


def statistics(
    metadata: Mapping[str, bytes], stored: Mapping[str, TensorInfo], path: Path
) -> dict[str, Any]:
    """The header in a statistics file's metadata, checked against the tensors in the file, by key.

    Raises CheckpointError for a file of another kind or version, or a damaged one.
    """
    if metadata.get("format") != STATISTICS_FORMAT.encode():
        raise CheckpointError(f"{path}: is not a statistics file; `pymerge stats` writes them")
    version = metadata.get("version")
    if version != STATISTICS_VERSION.encode():
        shown = "none" if version is None else _short(version[:60].decode("utf-8", "replace"))
        raise CheckpointError(
            f"{path}: has format version {shown}; this release reads version {STATISTICS_VERSION}"
        )
    content = parse_object(metadata.get("statistics", b""), path, MAX_INDEX, remedy=_AGAIN)
    try:
        _check(_Statistics, content)
        for key in content["tensors"]:
            _check_sum(content, key, stored)
        for key, own in content["aliases"].items():
            if key.partition("/")[0] != own.partition("/")[0] or own.partition("/")[0] not in KINDS:
                raise ValueError(f"aliases.{_short(key)}: is not of the kind of {_short(own)}")
    except ValueError as error:
        raise CheckpointError(
            f"{path}: has a damaged statistics header ({error}); {_AGAIN}"
        ) from None
    return content


def _check_sum(header: Mapping[str, Any], key: str, stored: Mapping[str, TensorInfo]) -> None:
    kind, _, name = key.partition("/")
    if kind not in KINDS:
        raise ValueError(f"tensors.{_short(key)}: is of no kind that there is, {', '.join(KINDS)}")
    table = header["layers" if kind in GRAMS else "parameters"]
    if name not in table or (kind == "block_fisher" and not table[name]):
        raise ValueError(f"tensors.{_short(key)}: is of a layer or parameter that it does not know")
    if key not in stored:
        raise ValueError(f"lacks sums that it announces, among them {_short(key)}")
    shape = sum_shape(header, key)
    info = stored[key]
    if (info.dtype, info.shape) != ("float32", shape):
        raise ValueError(
            f"tensors.{_short(key)}: is {info.dtype} {list(info.shape)} in the file and float32"
            f" {list(shape)} by the header"
        )


def sum_shape(header: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """The stored shape of a tensor according to the header's layers and parameters (S10)."""
    kind, _, name = key.partition("/")
    if kind == "diagonal_fisher":
        return tuple(header["parameters"][name])
    if kind == "block_fisher":
        size = elements(tuple(header["parameters"][name]))
    else:
        size = int(header["layers"][name]["d_in" if kind == "input_gram" else "d_out"])
    return (size * (size + 1) // 2,)
