"""The options of `mats` as plain numbers. Imports neither torch nor numpy."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pymerge.messages.arguments import argument, check_flags
from pymerge.messages.words import counted, shown, some_names, type_of
from pymerge.rules import types
from pymerge.rules.ties import _choice, _integer, _number, _plain, spelled

FLAVORS: tuple[str, ...] = get_args(types.MatsFlavor)
SOLVERS: tuple[str, ...] = get_args(types.Solver)
TASK_WEIGHTS: tuple[str, ...] = get_args(types.TaskWeights)
INITS: tuple[str, ...] = get_args(types.InitName)
PRECISIONS: tuple[str, ...] = get_args(types.Precision)

# M9: how often a breakdown may raise the damping, and by how much.
DAMPING_RAISES, DAMPING_FACTOR = 3, 10.0

# Above it `pymerge.statistics` leaves matrices out (S1): below a vocabulary, above the widest layer
# of models of 70 billion parameters.
MAX_DIM = 30720

# M3: beyond it, times statistics of fp32, products leave the range of numbers.
_LARGEST_WEIGHT = 1e12


@dataclass(frozen=True)
class MatsRule:
    """All that a solver needs beside the tensors (docs/spec/mats.md)."""

    solver: str
    iterations: int
    preconditioner: bool
    damping: float
    off_diagonal: float
    task_weights: str | tuple[float, ...]
    step_limit: float
    objective_tolerance: float
    residual_tolerance: float
    precision: str | None


def resolve(
    count: int,
    *,
    flavor: str = "default",
    solver: str = "cg",
    iterations: int | None = None,
    preconditioner: bool | None = None,
    damping: float = 0.01,
    off_diagonal: float = 1.0,
    task_weights: str | Sequence[float] = "raw",
    step_limit: float | None = None,
    objective_tolerance: float | None = None,
    residual_tolerance: float | None = None,
    precision: str | None = None,
) -> MatsRule:
    """Check the options of `mats` for `count` models and fill in what the flavor sets (M12).

    Raises ValueError or TypeError that names the option, the value and what is allowed (E3).
    """
    if count < 1:
        raise ValueError("weights is empty; pass the weight of at least one model")
    paper = _choice("flavor", flavor, FLAVORS) == "paper"
    if iterations is None:
        iterations = 100 if paper else 5
    number = _integer("iterations", iterations)
    if number < 0:
        raise ValueError(f"{argument('iterations', number)} is negative; pass 0 or more")
    if preconditioner is not None:
        check_flags(preconditioner=preconditioner)
    limit = math.inf if step_limit is None else _number("step_limit", step_limit)
    if not limit > 0:
        raise ValueError(f"{spelled('step_limit', limit)} is not positive; pass None for no limit")
    if objective_tolerance is None:
        objective_tolerance = 0.0 if paper else 1e-6
    if residual_tolerance is None:
        residual_tolerance = 1e-5 if paper else 0.0
    return MatsRule(
        solver=_choice("solver", solver, SOLVERS),
        iterations=number,
        preconditioner=(not paper) if preconditioner is None else preconditioner,
        damping=_at_least_zero("damping", damping),
        off_diagonal=off_diagonal_factor(off_diagonal),
        task_weights=given_task_weights(task_weights, count),
        step_limit=limit,
        objective_tolerance=_at_least_zero("objective_tolerance", objective_tolerance),
        residual_tolerance=_at_least_zero("residual_tolerance", residual_tolerance),
        precision=None if precision is None else _choice("precision", precision, PRECISIONS),
    )


# The names of the options of `mats`.
OPTIONS = tuple(inspect.signature(resolve).parameters)[1:]


def raised(damping: float) -> float:
    """M9: the damping after a breakdown."""
    return max(damping * DAMPING_FACTOR, 1e-3)


def off_diagonal_factor(value: Any) -> float:
    """M2."""
    factor = _number("off_diagonal", value)
    if not 0 <= factor <= 1:
        raise ValueError(
            f"{spelled('off_diagonal', factor)} is outside [0, 1]; 1 leaves the Gram matrices as"
            " they are, 0 keeps their diagonals alone"
        )
    return factor


def given_task_weights(value: Any, count: int) -> str | tuple[float, ...]:
    """M3: "raw", "trace" or one number per model."""
    if isinstance(value, str):
        return _choice("task_weights", value, TASK_WEIGHTS)
    given = _plain("task_weights", value)
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            f"task_weights={shown(value)} is {type_of(value)}; pass 'raw', 'trace' or"
            f" {counted(count, 'number')}"
        )
    if len(given) != count:
        raise ValueError(
            f"task_weights has {counted(len(given), 'value')} for {counted(count, 'model')}; pass"
            " one per model"
        )
    weights = tuple(_at_least_zero("task_weights", v, k) for k, v in enumerate(given))
    for k, weight in enumerate(weights):
        if weight and not 1 / _LARGEST_WEIGHT <= weight <= _LARGEST_WEIGHT:
            raise ValueError(
                f"{spelled('task_weights', weight, k)} is outside [{1 / _LARGEST_WEIGHT:g},"
                f" {_LARGEST_WEIGHT:g}]; only their ratios matter, and 0 leaves a model out"
            )
    if not any(weights):
        raise ValueError("task_weights are all 0; give at least one model a weight above 0")
    return weights


def task_weights(
    rule: str | tuple[float, ...], traces_a: Sequence[float], traces_b: Sequence[float] | None
) -> tuple[float, ...]:
    """M3: w_k from the traces of the statistics (after M2, which leaves traces alone)."""
    if not isinstance(rule, str):
        return rule
    if rule == "raw":
        return (1.0,) * len(traces_a)
    products = trace_products(traces_a, traces_b)
    inverse = [1 / t if t > 0 and math.isfinite(t) else 0.0 for t in products]
    counted = sum(v > 0 for v in inverse)
    total = sum(inverse)
    return tuple(v * counted / total for v in inverse) if counted else (0.0,) * len(inverse)


def vector_length(shape: Sequence[int]) -> int | None:
    """M16: d of a tensor that is a vector, whatever its other dimensions of 1; None of others."""
    size = math.prod(shape)
    return size if shape and size == max(shape) else None


# Tables of vectors that are looked up, and no linear maps, by the module's name.
_TABLES = ("embed", "wte", "wpe", "shared", "attention_bias", "position", "prompt", "a_log")


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is by name and shape the weight of a linear layer, or of experts."""
    parts = name.lower().removesuffix(".weight").split(".")
    if len(shape) not in (2, 3) or vector_length(shape) is not None:
        return False
    if any(word in part for part in parts[-2:] for word in _TABLES) or parts[-1].endswith("bias"):
        return False
    return len(shape) == 2 or any("expert" in part for part in parts)


def too_little(solved: int, linear: int, lost: Sequence[str], option: str) -> str:
    """What is wrong where less than half of the elements of linear layers are solved, empty where
    it is not so.
    """
    if not linear or 2 * solved >= linear:
        return ""
    return (
        f"only {100 * solved / linear:.0f} % of the elements of linear layers have statistics, and"
        f" the rest would be the initialisation ({some_names(lost)}): the data did not reach them,"
        " they were left out, or the statistics name them otherwise; collect statistics of them,"
        f" or let it through with {option}"
    )


def trace_products(traces_a: Sequence[float], traces_b: Sequence[float] | None) -> list[float]:
    """tr A_k tr B_k, with tr B_k = 1 where there is no B."""
    return [a * b for a, b in zip(traces_a, traces_b or [1.0] * len(traces_a), strict=True)]


def kronecker_shares(
    weights: Sequence[float], traces_a: Sequence[float], traces_b: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """a_k and b_k of M7: how the preconditioner's two matrices are summed.

    Exponents that add to 1 count each task's own term in the product as the system does. Measured
    on layers of MiniLM with 4 fine-tunes (1000 texts each, damping 0.01), preconditioned iterations
    until the objective of 100 plain ones, on the hardest layer (encoder.layer.5.output.dense): 15
    for 0.25 and 0.35, 16 for 0.5, 17 for 0 and for plain sums of the A_k and B_k; the nearest
    Kronecker products (in the traces, or in the Kullback-Leibler sense) count the own term twice,
    and did not get there in 25.
    """
    if traces_b is None:
        return list(weights), list(weights)
    shares = trace_shares(weights, trace_products(traces_a, traces_b)) or [0.0] * len(weights)
    a = [s ** (1 / 3) / t if s > 0 else 0.0 for s, t in zip(shares, traces_a, strict=True)]
    b = [s ** (2 / 3) / t if s > 0 else 0.0 for s, t in zip(shares, traces_b, strict=True)]
    return a, b


def trace_shares(weights: Sequence[float], products: Sequence[float]) -> tuple[float, ...]:
    """Each task's share of the sum of w_k tr A_k tr B_k (M3); empty where that is not positive."""
    parts = [w * t for w, t in zip(weights, products, strict=True)]
    total = sum(parts)
    return tuple(p / total for p in parts) if total > 0 and math.isfinite(total) else ()


def _at_least_zero(what: str, value: Any, model: int | None = None) -> float:
    number = _number(what, value, model)
    if number < 0:
        raise ValueError(f"{spelled(what, number, model)} is negative; pass 0 or more")
    return number
