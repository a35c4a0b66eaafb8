"""The ops as torch knows them, `torch.ops.pymerge.ties` and its like: what `torch.compile` and
`torch.export` put into their graphs (docs/compile.md).

A graph is made from tensors without values, and torch cannot look into compiled kernels. A
registered op is one node of it: the schema says what it takes, the fake kernel what shape and dtype
it returns, and when the graph runs, the node runs the package's own function. While such a graph is
made (`tracing`), the public functions call their ops instead of working.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from pymerge.ops.tensors import check_tensors
from pymerge.rules.gram import check_per, matrix_of
from pymerge.rules.ties import resolve_options

Tensor = torch.Tensor
Tensors = Sequence[torch.Tensor]


# Fake kernels. They run on tensors without values, check what shapes, dtypes and options tell, and
# return tensors that nothing was written to.


def _check(models: Tensors, base: Tensor | None, op: str, options: Mapping[str, Any]) -> Tensor:
    """Raises as the op does for what does not fit. Returns the tensor that the result is like."""
    check_tensors(models, base, op=op, readable=True)
    given = {name: value for name, value in options.items() if value is not None}
    resolve_options(len(models), **given)
    return models[0] if base is None else base


def _merged(
    models: Tensors,
    base: Tensor | None = None,
    *,
    name: str = "",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    like = _check(models, base, "ties", options)
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


def _thresholds(
    models: Tensors, base: Tensor | None = None, *, backend: str | None = None, **options: Any
) -> Tensor:
    like = _check(models, base, "select", options)
    inputs = [*models] if base is None else [base, *models]
    double = any(x.dtype == torch.float64 for x in inputs)
    dtype = torch.float64 if double else torch.float32
    device = "meta" if like.device.type == "meta" else "cpu"  # where the op returns them
    return torch.empty(len(models), dtype=dtype, device=device)


def _products(
    models: Tensors,
    base: Tensor | None = None,
    *,
    per: str | None = None,
    non_finite: str | None = None,
    backend: str | None = None,
) -> Tensor:
    like = _check(models, base, "gram", {"non_finite": non_finite})
    groups = _groups(like, per or "tensor")
    pairs = (len(models), len(models))
    shape = pairs if groups is None else (groups, *pairs)
    return torch.empty(shape, dtype=torch.float64, device=like.device)


def _combined(
    models: Tensors,
    coefficients: Tensor,
    base: Tensor | None = None,
    *,
    per: str | None = None,
    non_finite: str | None = None,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    like = _check(models, base, "combine", {"non_finite": non_finite})
    _groups(like, per or "tensor")
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


def _groups(like: Tensor, per: str) -> int | None:
    """The number of matrices that `gram` returns; None for one without a dimension of its own."""
    check_per(per)
    rows, columns = matrix_of(tuple(like.shape), per)
    return {"tensor": None, "row": rows, "column": columns}[per]


def _layer(weights: Tensors, matrices: Tensors, *rest: Any, **options: Any) -> Tensor:
    check_tensors(weights, None, "weights", "mats", readable=True)
    return torch.empty(weights[0].shape, dtype=weights[0].dtype, device=weights[0].device)


def _results(
    tensors: Tensors, call: str, floats: Sequence[float] = (), ints: Sequence[int] = ()
) -> list[Tensor]:
    said = ast.literal_eval(call)
    models, base = _split(tensors, said)
    likes = models[0] if base is None else base
    dtypes = said["dtypes"] or [None] * len(likes)
    return [
        torch.empty(x.shape, dtype=x.dtype if to is None else getattr(torch, to), device=x.device)
        for x, to in zip(likes, dtypes, strict=True)
    ]


def _split(tensors: Tensors, said: Mapping[str, Any]) -> tuple[list[Tensors], Tensors | None]:
    """The tensors of each model and those of the base."""
    width = len(said["names"] or [""])
    parts = [tensors[at : at + width] for at in range(0, len(tensors), width)]
    return (parts[:-1], parts[-1]) if said["base"] else (parts, None)


@dataclass(frozen=True)
class Op:
    """A public function under a schema whose arguments have the function's names. What is None
    there is left to the function's own default.

    dtype, among the arguments, is that of the result (of the function's out=); start is a tensor
    for init. fixed: further arguments of the function.
    """

    function: str
    schema: str
    fake: Callable[..., Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)


_MATS = (
    "Tensor? base=None, Tensor? start=None, *, str? init=None, float? off_diagonal=None,"
    " float[]? task_weights=None"
)

TABLE = {
    "ties": Op(
        "ties",
        "(Tensor[] models, Tensor? base=None, *, float[]? density=None, float[]? weights=None,"
        " float? scaling=None, str? flavor=None, str? trim=None, str? elect=None, str? merge=None,"
        " str? zero_sign=None, str? scope=None, str? rescale=None, float[]? gamma=None,"
        " float[]? epsilon=None, int? seed=None, str? non_finite=None, str name='',"
        " str? backend=None, ScalarType? dtype=None) -> Tensor",
        _merged,
    ),
    "select": Op(
        "select",
        "(Tensor[] models, Tensor? base=None, *, float[]? density=None, str? flavor=None,"
        " str? scope=None, str? backend=None) -> Tensor",
        _thresholds,
    ),
    "gram": Op(
        "gram",
        "(Tensor[] models, Tensor? base=None, *, str? per=None, str? non_finite=None,"
        " str? backend=None) -> Tensor",
        _products,
    ),
    "combine": Op(
        "combine",
        "(Tensor[] models, Tensor coefficients, Tensor? base=None, *, str? per=None,"
        " str? non_finite=None, str? backend=None, ScalarType? dtype=None) -> Tensor",
        _combined,
    ),
    # `pymerge.mats` without its report.
    "cg": Op(
        "mats",
        f"(Tensor[] weights, Tensor[] input_grams, Tensor[]? output_grams=None, {_MATS},"
        " str? flavor=None, int? iterations=None, bool? preconditioner=None, float? damping=None,"
        " float? step_limit=None, float? objective_tolerance=None,"
        " float? residual_tolerance=None, str? precision=None, str? backend=None) -> Tensor",
        _layer,
        {"solver": "cg"},
    ),
    "regmean": Op(
        "regmean",
        f"(Tensor[] weights, Tensor[] input_grams, {_MATS}) -> Tensor",
        _layer,
    ),
    "weighted_average": Op(
        "weighted_average",
        "(Tensor[] weights, Tensor[] fishers, Tensor? base=None, Tensor? start=None, *,"
        " float[]? task_weights=None, float? minimum=None, str? init=None) -> Tensor",
        _layer,
    ),
}


# While an op runs its function, which must then not call the op.
_running: ContextVar[bool] = ContextVar("pymerge_op_runs", default=False)


def _run(function: str, given: Mapping[str, Any]) -> Any:
    """Call a public function."""
    token = _running.set(True)
    try:
        return getattr(importlib.import_module("pymerge"), function)(**given)
    finally:
        _running.reset(token)


def _kernel(name: str, op: Op) -> Callable[..., Tensor]:
    """What the op does with values."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        schema = getattr(torch.ops.pymerge, name).default._schema
        names = [each.name for each in schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs, **op.fixed}
        given = {key: value for key, value in given.items() if value is not None}
        if "dtype" in names:
            given.pop("dtype", None)
            given["out"] = op.fake(*args, **kwargs)
        if "start" in given:
            given["init"] = given.pop("start")
        made = _run(op.function, given)
        result: Tensor = getattr(made, "weight", made)
        # A layer that keeps its initialisation may be what was passed, which no op may return.
        return result if "out" in given else result.clone(memory_format=torch.contiguous_format)

    return run


def _merge(
    tensors: Tensors, call: str, floats: Sequence[float] = (), ints: Sequence[int] = ()
) -> list[Tensor]:
    """The op `merge`: a public function of tensors or of state dicts.

    tensors: of each model in turn, then of the base. call: a dict as Python writes it: "function",
    its name; "names" of the state dicts' tensors, None for single tensors; "base", whether there is
    one; "dtypes" of the results as torch names them, None for those of the base; "options". Numbers
    may be ("float", i) and ("int", i), which stand for floats[i] and ints[i].
    """
    said = ast.literal_eval(call)
    models, base = _split(tensors, said)
    made = _results(tensors, call)
    names = said["names"]

    def argument(part: Tensors) -> Any:
        return part[0] if names is None else dict(zip(names, part, strict=True))

    options = _filled(said["options"], {"float": floats, "int": ints})
    given = {**options, "models": [argument(each) for each in models], "out": argument(made)}
    if base is not None:
        given["base"] = argument(base)
    result = _run(said["function"], given)
    if names is not None and list(result) != names:
        raise ValueError(
            f"the result has other names than the state dicts; call {said['function']} outside of"
            " what is compiled"
        )
    return made


def _filled(value: Any, numbers: Mapping[str, Sequence[float]]) -> Any:
    """A value with its numbers in their places."""
    if isinstance(value, dict):
        return {name: _filled(each, numbers) for name, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, numbers) for each in value]
    return numbers[value[0]][value[1]] if isinstance(value, tuple) else value


def _register() -> None:
    for name, op in TABLE.items():
        made = torch.library.custom_op(
            f"pymerge::{name}", _kernel(name, op), mutates_args=(), schema=op.schema
        )
        made.register_fake(op.fake)
    schema = "(Tensor[] tensors, str call, float[] floats=[], int[] ints=[]) -> Tensor[]"
    made = torch.library.custom_op("pymerge::merge", _merge, mutates_args=(), schema=schema)
    made.register_fake(_results)


_register()

# What public functions do while they are traced. torch.compile reads this code rather than running
# it, so it is plain: no exceptions to catch, nothing that asks a tensor for more than its kind.


def tracing() -> bool:
    """Whether torch.compile or torch.export makes a graph of what is called."""
    return torch.compiler.is_dynamo_compiling() or (
        torch.compiler.is_compiling() and not _running.get()
    )


def are_plain(options: Mapping[str, Any]) -> bool:
    """Whether the values of options are written in a graph: numbers, words, and lists of them."""
    for value in options.values():
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if each is not None and type(each) not in (bool, int, float, str):
                return False
    return True


def ties(models: Any, base: Any, out: Any, **options: Any) -> Any:
    """`pymerge.ties` in a graph."""
    if isinstance(models[0], Mapping) or isinstance(base, Mapping):
        return merge("ties", models, base, out, options)
    return _into(
        out,
        torch.ops.pymerge.ties(
            _detached(models),
            None if base is None else base.detach(),
            dtype=None if out is None else out.dtype,
            **_lists(options, len(models)),
        ),
    )


def select(models: Any, base: Any, **options: Any) -> Any:
    """`pymerge.select` of tensors in a graph."""
    start = None if base is None else base.detach()
    return torch.ops.pymerge.select(_detached(models), start, **_lists(options, len(models)))


def gram(models: Any, base: Any, **options: Any) -> Any:
    """`pymerge.gram` in a graph."""
    start = None if base is None else base.detach()
    return torch.ops.pymerge.gram(_detached(models), start, **options)


def combine(models: Any, coefficients: Any, base: Any, out: Any, **options: Any) -> Any:
    """`pymerge.combine` in a graph."""
    if not isinstance(coefficients, torch.Tensor):
        coefficients = torch.tensor(coefficients, dtype=torch.float64, device="cpu")
    return _into(
        out,
        torch.ops.pymerge.combine(
            _detached(models),
            coefficients.detach(),
            None if base is None else base.detach(),
            dtype=None if out is None else out.dtype,
            **options,
        ),
    )


def merge(function: str, models: Any, base: Any, out: Any, options: Mapping[str, Any]) -> Any:
    """A public function of tensors or of state dicts in a graph; the state dicts have the same
    names.
    """
    inputs = [*models] if base is None else [*models, base]
    like = inputs[0] if base is None else base
    if isinstance(like, torch.Tensor):
        names, tensors, written = None, _detached(inputs), [] if out is None else [out]
    else:
        names = list(like)
        for each in inputs:
            if sorted(each) != sorted(names):
                raise ValueError(
                    "the state dicts have different names; where a merge is compiled, all have the"
                    " same: merge these outside of it"
                )
        tensors = [each[name].detach() for each in inputs for name in names]
        written = [] if out is None else [out[name] for name in names]
    dtypes = None if out is None else [str(each.dtype).removeprefix("torch.") for each in written]
    call = {
        "function": function,
        "names": names,
        "base": base is not None,
        "dtypes": dtypes,
        "options": options,
    }
    floats: list[float] = []
    ints: list[int] = []
    said = _spelled(call, floats, ints)
    made = torch.ops.pymerge.merge(tensors, said, floats, ints)
    if out is not None:
        made = [_into(each, value) for each, value in zip(written, made, strict=True)]
    return made[0] if names is None else dict(zip(names, made, strict=True))


def _detached(tensors: Any) -> list[Tensor]:
    """Without gradients, as results are: an op cannot be told to record none."""
    return [each.detach() for each in tensors]


def _into(out: Tensor | None, made: Tensor) -> Tensor:
    if out is None:
        return made
    if out.shape != made.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, the inputs {tuple(made.shape)}")
    out.detach().copy_(made)
    return out


def _lists(options: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Options with one number per model, where one for all was given."""
    found = dict(options)
    for name in ("density", "weights", "gamma", "epsilon"):
        value = found.get(name)
        if value is not None and not isinstance(value, (list, tuple)):
            found[name] = [value] * count
    return found


def _spelled(value: Any, floats: list[float], ints: list[int]) -> str:
    """A value of dicts, lists and plain options as Python writes it, as torch.compile can follow.

    floats, ints: get the numbers, for which only their places are written: a graph may be made for
    any value of a number.
    """
    if isinstance(value, Mapping):
        items = [f"{key!r}: {_spelled(each, floats, ints)}" for key, each in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join([_spelled(each, floats, ints) for each in value]) + "]"
    if type(value) is float:
        floats.append(value)
        return f"('float', {len(floats) - 1})"
    if type(value) is int:
        ints.append(value)
        return f"('int', {len(ints) - 1})"
    return f"{value!r}"
