"""Conjugate gradient on a stack of layers, with its safeguards: more damping after a breakdown, the
true residual of the result (M6 to M10).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from pymerge.backends.cg.iteration import CgState, conjugate_gradient
from pymerge.backends.registry import small_kernel, vector_updates
from pymerge.ops.mats import small_layers
from pymerge.ops.mats.system import Operator, Preconditioner, System
from pymerge.rules.mats import DAMPING_RAISES, MatsRule, raised

# M10: the share of a decrease that rounding may take, and how near to f(X0) a decrease may be,
# before both are computed in float64; and how far it may be above f(X0) then.
_DOUBT, _NEARLY, _ROUNDED = 1e-3, 0.999, 1 + 1e-6


@dataclass
class Outcome:
    """One layer's status and numbers for `MatsReport`; `length` is D ."""

    status: str
    iterations: int
    damping: float
    breakdowns: int
    decrease: float
    residual_start: float
    residual_exit: float
    length: float


@dataclass
class Objective:
    """What a step is judged by (M10): f(X0) of every layer as the solver's precision has it, and
    f(X0) and f(X0 + D) of one layer and a step D in float64.
    """

    start: Sequence[float]
    exactly: Callable[[int, torch.Tensor], tuple[float, float]]

    def layer(self, index: int) -> Objective:
        """Of one layer of the stack."""
        return Objective([self.start[index]], lambda _, step: self.exactly(index, step))


def solve_stack(
    system: System,
    rest: torch.Tensor,
    rule: MatsRule,
    precision: str,
    limit: list[float],
    small: torch.Tensor,
    objective: Objective,
    backend: str = "auto",
) -> tuple[torch.Tensor, list[Outcome]]:
    """The step D (L, d_out, d_in) from 𝓐(D) = rest, and the outcome of each layer.

    limit: largest ||D|| per layer, infinity for none. backend: of the vector updates. small: (L,)
        the ||r|| at which a layer has converged.
    """
    bound = None
    if min(limit) < math.inf:
        bound = torch.tensor(limit, dtype=torch.float64, device=rest.device)
    precondition = Preconditioner(system, rule, rule.damping)
    state = _run(
        system,
        precondition,
        torch.zeros_like(rest),
        rest.clone(),
        rule,
        rule.iterations,
        bound,
        small,
        precision,
        backend,
    )
    damping = 0.0 if precondition.identity else precondition.damping
    outcomes = _judge(system, rest, objective, state, damping)
    if precondition.identity:
        for i, outcome in enumerate(outcomes):
            _fall_back(outcome, state.step[i])
        return state.step, outcomes
    for i, outcome in enumerate(outcomes):
        if outcome.status == "breakdown":
            outcomes[i] = _again(
                system.layer(i),
                rest[i : i + 1],
                rule,
                precision,
                state.step[i : i + 1],
                outcome,
                None if bound is None else bound[i : i + 1],
                small[i : i + 1],
                objective.layer(i),
                backend,
            )
    return state.step, outcomes


def _run(
    system: System,
    precondition: Preconditioner,
    step: torch.Tensor,
    r: torch.Tensor,
    rule: MatsRule,
    iterations: int,
    bound: torch.Tensor | None,
    small: torch.Tensor,
    precision: str,
    backend: str,
) -> CgState:
    """Conjugate gradient by whichever way of the backend suits the size of the layers."""
    kernel = small_kernel(step.device.type, backend)
    if kernel is not None and small_layers.takes(step, precision):
        return small_layers.solve(
            kernel,
            system,
            precondition,
            step,
            r,
            rule.objective_tolerance,
            iterations,
            bound,
            small,
        )
    operator = Operator(system, step.shape[1], precision)
    turned = None if precondition.identity else precondition
    updates = vector_updates(step.device.type, backend)
    return conjugate_gradient(operator, turned, step, r, rule, iterations, bound, small, updates)


def _again(
    system: System,
    rest: torch.Tensor,
    rule: MatsRule,
    precision: str,
    step: torch.Tensor,
    outcome: Outcome,
    bound: torch.Tensor | None,
    small: torch.Tensor,
    objective: Objective,
    backend: str,
) -> Outcome:
    """M9: retry one layer from its last good iterate `step` (overwritten), each time with ten times
    the damping.
    """
    operator = Operator(system, rest.shape[1], precision)
    for _ in range(DAMPING_RAISES):
        before = outcome
        damping = raised(before.damping)
        precondition = Preconditioner(system, replace(rule, damping=damping), damping)
        r = rest - operator(step, torch.empty_like(step))
        left = rule.iterations - before.iterations
        state = _run(system, precondition, step, r, rule, left, bound, small, precision, backend)
        outcome = _judge(system, rest, objective, state, precondition.damping)[0]
        outcome.breakdowns = before.breakdowns + 1
        if outcome.iterations or outcome.length > 0:
            outcome.iterations += before.iterations
        if outcome.status != "breakdown":
            return outcome
    _fall_back(outcome, step[0])
    return outcome


def _judge(
    system: System, rest: torch.Tensor, objective: Objective, state: CgState, damping: float
) -> list[Outcome]:
    """M10: the true residual and decrease. A layer that did not get better, or better than can be,
    goes back to 0, as a breakdown.
    """
    step = state.step
    image = torch.empty_like(step)
    Operator(system, step.shape[1], "fp64" if step.dtype == torch.float64 else "fp32")(step, image)
    dot = torch.linalg.vecdot
    flat, start = step.flatten(1), rest.flatten(1)
    decrease = (dot(flat, start) - dot(flat, image.flatten(1)) / 2).double() / system.scale
    residuals = [x.flatten(1).norm(dim=1).double() / system.scale for x in (rest, rest - image)]
    numbers = torch.stack((decrease, *residuals, flat.norm(dim=1).double())).T.tolist()
    flags = torch.stack((state.iterations, state.broke, state.limited, state.converged)).T.tolist()
    outcomes = []
    for i, (row, (done, broke, limited, converged)) in enumerate(zip(numbers, flags, strict=True)):
        gained, before, after, length = row
        most = objective.start[i]
        doubt = torch.finfo(step.dtype).eps / 2 * system.level(i) * length * length
        if not (doubt <= _DOUBT * gained and gained <= _NEARLY * most):
            most, least = objective.exactly(i, step[i])
            gained = most - least
        if length != 0 and not (0 < gained <= most * _ROUNDED and after < math.inf):
            step[i].zero_()
            gained, after, length, done, broke = 0.0, before, 0.0, 0, True
        names = (("breakdown", broke), ("step_limit", limited), ("converged", converged))
        status = next((name for name, flag in names if flag), "iterations")
        outcomes.append(Outcome(status, int(done), damping, 0, gained, before, after, length))
    return outcomes


def _fall_back(outcome: Outcome, step: torch.Tensor) -> None:
    """M9: without a good iterate the initialisation stays."""
    if outcome.status == "breakdown" and outcome.length == 0:
        outcome.status, outcome.iterations = "initialisation", 0
