"""mergekit's YAML: read, checked as a whole, every problem at once with its line. No model is
opened here.

`read_config` gives a `Config`; `pymerge.recipe.resolve` turns it into a recipe for the engine.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic_core import PydanticCustomError

from pymerge.checkpoint.files import IrregularError, is_file, open_regular
from pymerge.dtypes import MERGEABLE
from pymerge.errors import ConfigError
from pymerge.messages.arguments import argument
from pymerge.messages.words import type_of
from pymerge.methods._settings import Case, Setting
from pymerge.methods._table import KNOWN_PARAMETERS
from pymerge.methods.method import kind_of, short
from pymerge.recipe.chat_templates import chat_template
from pymerge.recipe.checks import check_content
from pymerge.recipe.ignored import notes_on_models, take_ignored
from pymerge.recipe.references import ModelReference, find_local, parse_reference
from pymerge.recipe.token_settings import TokenSetting, parse_token
from pymerge.recipe.yaml import MAX_BYTES, Document, Path, read_yaml

# More problems than anybody reads; a file that is no recipe at all can have thousands.
MAX_PROBLEMS = 100
_MOST_PADDING = 1 << 16
# How keys of YAML files begin that only hold anchors: x-models is not a misspelt `models`.
_EXTENSIONS = ("x-", "x_", ".", "_")
_DTYPE_SPELLINGS = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
}


def _reference(raw: Any, info: ValidationInfo) -> ModelReference:
    try:
        return parse_reference(raw, (info.context or {}).get("folder"))
    except ValueError as error:
        raise PydanticCustomError("recipe", "{text}", {"text": str(error)}) from None


def _statistics(raw: Any, info: ValidationInfo) -> str | None:
    if raw is None:
        return None
    if not isinstance(raw, str) or not raw:
        text = f"{short(raw)} is {kind_of(raw)}; pass a file that `pymerge stats` wrote"
        raise PydanticCustomError("recipe", "{text}", {"text": text})
    found = find_local(raw, (info.context or {}).get("folder"))
    if found is None or not is_file(found):
        text = (
            f"there is no file {short(raw)}; write it with `pymerge stats MODEL TEXTS --out {raw}`"
        )
        raise PydanticCustomError("recipe", "{text}", {"text": text})
    return str(found)


def _layer_range(raw: Any) -> tuple[int, int]:
    ends = raw if isinstance(raw, Sequence) and not isinstance(raw, str) else []
    if len(ends) != 2 or not all(
        isinstance(end, int) and not isinstance(end, bool) for end in ends
    ):
        text = f"{short(raw)} is not [first, end), two layer numbers"
        raise PydanticCustomError("recipe", "{text}", {"text": text})
    if not 0 <= ends[0] <= ends[1]:
        text = (
            f"{short(list(ends))} runs backwards or is negative; the first layer is 0, the end is"
            " not included"
        )
        raise PydanticCustomError("recipe", "{text}", {"text": text})
    return ends[0], ends[1]


def _dtype(raw: Any) -> str | None:
    if raw is None:
        return None
    name = raw.removeprefix("torch.") if isinstance(raw, str) else raw
    if name in MERGEABLE:
        return str(name)
    near = _DTYPE_SPELLINGS.get(str(name).lower()) or next(
        iter(difflib.get_close_matches(str(name), MERGEABLE, n=1)), None
    )
    hint = f"; did you mean {near!r}?" if near else ""
    raise PydanticCustomError(
        "recipe", "{text}", {"text": f"{short(raw)} is not one of {', '.join(MERGEABLE)}{hint}"}
    )


def _out_dtype(raw: Any) -> str | Setting | None:
    """A dtype, or a list of {filter, value} whose first match counts."""
    if not isinstance(raw, (list, dict)):
        return _dtype(raw)
    cases = []
    for item in raw if isinstance(raw, list) else [raw]:
        if not isinstance(item, dict) or not {"value"} <= item.keys() <= {"filter", "value"}:
            text = f"{short(item)} is not {{filter: part of a tensor name, value: dtype}}"
            raise PydanticCustomError("recipe", "{text}", {"text": text})
        pattern, value = item.get("filter"), _dtype(item["value"])
        if value is None or not (pattern is None or isinstance(pattern, str)):
            text = f"{short(item)} needs a part of a tensor name, if any, and a dtype"
            raise PydanticCustomError("recipe", "{text}", {"text": text})
        cases.append(Case(pattern, (value,)))
    return Setting(tuple(cases))


def _tokenizer_source(raw: Any, info: ValidationInfo) -> ModelReference | str | None:
    if raw is None:
        return None
    return str(raw) if raw in ("base", "union") else _reference(raw, info)


def _chat_template(raw: Any, info: ValidationInfo) -> str | None:
    if raw is None or raw == "":
        return None
    folder = (info.context or {}).get("folder")
    try:
        if not isinstance(raw, str):
            raise ValueError(f"{short(raw)} is {kind_of(raw)}; pass text")
        return chat_template(raw, lambda text: find_local(text, folder))
    except ValueError as error:
        raise PydanticCustomError("recipe", "{text}", {"text": str(error)}) from None


def _multiple(raw: Any) -> int | None:
    if raw is None or (type(raw) is int and 1 <= raw <= _MOST_PADDING):
        return raw
    text = f"{short(raw)} is not a whole number from 1 to {_MOST_PADDING}; 64 is usual"
    raise PydanticCustomError("recipe", "{text}", {"text": text})


def _token(raw: Any, info: ValidationInfo) -> TokenSetting[ModelReference]:
    try:
        return parse_token(
            raw, lambda each: parse_reference(each, (info.context or {}).get("folder"))
        )
    except ValueError as error:
        raise PydanticCustomError("recipe", "{text}", {"text": str(error)}) from None


Reference = Annotated[ModelReference, BeforeValidator(_reference)]
StatisticsFile = Annotated[str | None, BeforeValidator(_statistics)]
LayerRange = Annotated[tuple[int, int], BeforeValidator(_layer_range)]
Dtype = Annotated[str | None, BeforeValidator(_dtype)]
OutDtype = Annotated[str | Setting | None, BeforeValidator(_out_dtype)]
TokenizerSource = Annotated[ModelReference | str | None, BeforeValidator(_tokenizer_source)]
TokenRows = dict[str, Annotated[TokenSetting[ModelReference], BeforeValidator(_token)]]
# Checked by method, level and value in pymerge.recipe.checks.
Parameters = dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=()
    )


class InputModel(_Strict):
    """An entry of `models`. statistics: of the model, for the methods that need them."""

    model: Reference
    statistics: StatisticsFile = None
    parameters: Parameters | None = None


class SliceSource(_Strict):
    """An entry of a slice's `sources`: layers first to end - 1 of a model."""

    model: Reference
    layer_range: LayerRange
    statistics: StatisticsFile = None
    parameters: Parameters | None = None


class OutputSlice(_Strict):
    """An entry of `slices`: consecutive layers of the output."""

    sources: list[SliceSource] = Field(min_length=1)
    base_model: Reference | None = None
    residual_weight: float | None = None
    parameters: Parameters | None = None


class Module(_Strict):
    """An entry of `modules`."""

    models: list[InputModel] | None = None
    slices: list[OutputSlice] | None = None
    parameters: Parameters | None = None


class Tokenizer(_Strict):
    """The entry `tokenizer`."""

    source: TokenizerSource = "union"
    tokens: TokenRows | None = None
    pad_to_multiple_of: Annotated[int | None, BeforeValidator(_multiple)] = None


class Config(_Strict):
    """A checked configuration; `parameters` at every level are as written."""

    merge_method: str
    models: list[InputModel] | None = None
    slices: list[OutputSlice] | None = None
    modules: dict[str, Module] | None = None
    base_model: Reference | None = None
    parameters: Parameters | None = None
    dtype: Dtype = None
    out_dtype: OutDtype = None
    tokenizer_source: TokenizerSource = None
    tokenizer: Tokenizer | None = None
    chat_template: Annotated[str | None, BeforeValidator(_chat_template)] = None


def read_config(config: str | FilePath | Mapping[str, Any]) -> tuple[Config, Document, list[str]]:
    """Read and check a YAML file, or a mapping of the same keys.

    Returns the configuration, its document and notes on what has no effect. ConfigError lists the
    problems with their lines: unknown keys, wrong types, methods, parameters and values, models
    that are missing or repeated.
    """
    if isinstance(config, Mapping):
        return check_config(Document(_plain(config), "configuration"), None)
    text, path = read_text(config)
    return check_config(read_yaml(text, str(path)), path.parent)


def read_text(config: str | FilePath) -> tuple[bytes, FilePath]:
    """The bytes of a configuration file, one more than allowed at most, and its path. ConfigError
    where it cannot be read, TypeError for what is no path.
    """
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(
            f"{argument('config')} is {type_of(config)}; pass the path of a YAML file, or a mapping"
            " of the same keys"
        )
    if "\n" in str(config):
        raise ConfigError(
            "the configuration is a text of several lines, not the path of a YAML file; pass"
            " yaml.safe_load of it"
        )
    path = FilePath(config)
    try:
        with open_regular(path) as file:
            text = file.read(MAX_BYTES + 1)
    except IrregularError as error:
        raise ConfigError(
            f"cannot read the configuration {str(path)!r}: it {error.strerror}; name a file that"
            " holds the recipe"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {str(path)!r}: {error.strerror or error}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error}") from None
    return text, path


def check_config(document: Document, folder: FilePath | None) -> tuple[Config, Document, list[str]]:
    """As `read_config`, for a document already parsed; paths are also looked up in `folder`."""
    if not isinstance(document.data, dict):
        what = (
            "is empty" if document.data is None else f"is {kind_of(document.data)}, not a mapping"
        )
        raise ConfigError(f"{document.source} {what}; it needs merge_method and models or slices")
    for key in document.shared.difference(Config.model_fields):
        # A key that holds anchors, unless it looks like a misspelt key.
        extension = key.startswith(_EXTENSIONS)
        if extension or not difflib.get_close_matches(key, Config.model_fields, n=1):
            document.data.pop(key, None)
    problems: list[tuple[Path, str]] = []
    named = document.data.pop("name", None) is not None
    ignored = list(take_ignored(document.data))
    result = None
    try:
        result = Config.model_validate(document.data, context={"folder": folder})
    except ValidationError as error:
        problems += [_structure_problem(item) for item in error.errors(include_url=False)]

    def reference(raw: Any) -> ModelReference | None:
        try:
            return parse_reference(raw, folder)
        except ValueError:
            return None  # reported with the structure

    found, remarks = check_content(document.data, reference)
    problems += found
    if named:
        remarks.append((("name",), "name has no effect in a recipe of its own"))
    remarks += ignored
    remarks += notes_on_models(document.data, (), folder)
    if problems or result is None:
        problems.sort(key=lambda problem: _line(document, problem[0]))
        listed = [f"{document.where(path)}: {text}" for path, text in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            listed.append(f"and {len(problems) - MAX_PROBLEMS} more")
        raise ConfigError(listed)
    remarks.sort(key=lambda remark: _line(document, remark[0]))
    notes = [f"{document.where(path)}: {text}" for path, text in remarks]
    return result, document, notes


def _line(document: Document, path: Path) -> int:
    while path and path not in document.lines:
        path = path[:-1]
    return document.lines.get(path, 0)


def dotted(path: Path) -> str:
    """models[0].parameters.density"""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f"{'.' if text else ''}{step}"
    return text


_EXPECTED = {
    "string_type": "pass text",
    "list_type": "pass a list",
    "dict_type": "pass a mapping",
    "model_type": "pass a mapping",
    "model_attributes_type": "pass a mapping",
    "float_type": "pass a number",
    "float_parsing": "pass a number",
}


def _structure_problem(error: Any) -> tuple[Path, str]:
    path: Path = tuple(error["loc"])
    name = dotted(path)
    if error["type"] == "extra_forbidden":
        allowed = list(_schema(path[:-1]).model_fields)
        near = difflib.get_close_matches(str(path[-1]), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(allowed)}"
        if path[-1] in KNOWN_PARAMETERS:
            hint = "; it is a parameter, so write it in `parameters`"
        return path, f"unknown key {short(name)}{hint}"
    if error["type"] == "missing":
        return path, f"{name} is missing"
    if error["type"] == "recipe":
        return path, f"{name}: {error['msg']}"
    if error["type"] == "too_short":
        return path, f"{name} is empty; it needs at least one entry"
    value = error["input"]
    expected = _EXPECTED.get(error["type"], error["msg"])
    return path, f"{name}: {short(value)} is {kind_of(value)}; {expected}"


def _schema(path: Path) -> type[BaseModel]:
    """The schema of the mapping at a place."""
    if not path:
        return Config
    if path == ("tokenizer",):
        return Tokenizer
    if len(path) == 2 and path[0] == "modules":
        return Module
    kinds: dict[Any, type[BaseModel]] = {
        "models": InputModel,
        "slices": OutputSlice,
        "sources": SliceSource,
    }
    return kinds[path[-2]]


def _plain(value: Any, path: Path = ()) -> Any:
    """A mapping given in Python as the plain data that a YAML file could hold: paths to text,
    tuples and arrays to lists, numbers of NumPy and others to Python's. ConfigError for the rest:
    not all of it could be read twice, or written into the model card.
    """
    if len(path) > 32:
        raise ConfigError("configuration: nested deeper than 32 levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(
                    f"configuration: key {short(key)} is {kind_of(key)}; keys are text"
                )
        return {_text(key): _plain(item, (*path, _text(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*path, index)) for index, item in enumerate(value)]
    if hasattr(value, "tolist"):
        with contextlib.suppress(RuntimeError, TypeError):  # a meta tensor, a class
            value = value.tolist()
        if isinstance(value, list):
            return _plain(value, path)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, FilePath):
        return str(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return int(value)
    if hasattr(value, "__float__"):
        with contextlib.suppress(RuntimeError, TypeError, ValueError, OverflowError):
            return float(value)
    raise ConfigError(
        f"configuration: {dotted(path)}: {short(value)} is {kind_of(value)}; pass text, a number, a"
        " list or a mapping"
    )


def _text(value: str) -> str:
    """Of a subclass, as the members of an enumeration, the text that it is."""
    return str.__str__(value)
