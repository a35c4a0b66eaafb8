"""The methods of docs/spec/matrix.md as functions of tensors or of state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import SupportsFloat, SupportsIndex, TypeVar

import torch

from pymerge.engine.method_functions import _run
from pymerge.rules.matrix import DAMPING, ITERATIONS
from pymerge.rules.report import MatsReport
from pymerge.rules.types import Backend, NonFinite

# All arguments of a call are of one kind: tensors give a tensor, state dicts a dict.
Model = TypeVar("Model", torch.Tensor, dict[str, torch.Tensor], Mapping[str, torch.Tensor])


def wudi(
    models: Sequence[Model],
    base: Model,
    *,
    iterations: SupportsIndex = ITERATIONS,
    damping: SupportsFloat = DAMPING,
    scaling: SupportsFloat = 1.0,
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
    reports: list[MatsReport] | None = None,
) -> Model:
    """Merge task vectors so that they interfere little with each other's inputs, without data.

    With T_k = models[k] - base, whose rows span what the inputs of task k look like:

        f(T) = sum_k ||(T - T_k) T_k^T||^2 / ||T_k||^2
        out  = base + scaling * T

    T takes a few preconditioned conjugate-gradient steps from the sum of the T_k towards the
    minimiser of f, which is RegMean's system with G_k = T_k^T T_k. The minimiser itself may be many
    times as large as the sum. Rules X1 to X5 of docs/spec/matrix.md.

    models: K weights of a linear layer, (d_out, d_in) as `torch.nn.Linear` stores them (float32,
        float16, bfloat16 or float64, each its own dtype), or K state dicts. Of a state dict, what
        is no linear layer's weight becomes base + scaling * the average of the task vectors; so
        does a tensor of other than two dimensions.
    base: tensor or state dict of the same kind.
    iterations: at most so many steps; 0 gives the sum of the task vectors. damping: of the
        preconditioner, in units of the mean diagonal; more damping goes less far in directions
        that the task vectors hardly have.
    non_finite, backend, out: as for `pymerge.ties`; matrix products are torch's. With "allow", a
        task vector that is not finite is left out of its matrix.
    reports: a list that gets a report of each matrix: f at the start and how much it decreased,
        and growth, ||T|| / ||sum_k T_k||.

    Returns a tensor, or for state dicts a dict in the base's order, as `pymerge.merge` does, whose
    errors are raised too. Warns where a matrix has grown to more than twice the sum.

    Source: Cheng et al. 2025, arXiv:2503.08099, which takes 300 steps of Adam.
    """
    names = ("iterations", "damping", "scaling")
    return _run("wudi", models, base, out, locals(), names, reports)


def tsv(
    models: Sequence[Model],
    base: Model,
    *,
    scaling: SupportsFloat = 1.0,
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """Merge the leading singular vectors of the task vectors, made orthogonal (TSV-Merge).

    With T_k = models[k] - base = U_k S_k V_k^T cut to 1/K of the singular values each, and
    U = [U_1 ... U_K], V and S alike:

        out = base + scaling * polar(U) S polar(V)^T

    polar(U) = U (U^T U)^(-1/2), the nearest matrix with orthonormal columns. Rules X1 to X3 and X6
    of docs/spec/matrix.md. Singular values at the level of rounding count as none.

    models, base: as for `pymerge.wudi`; the same in either orientation of a weight.
    scaling: the paper's alpha.
    non_finite, backend, out, result, errors: as for `pymerge.wudi`. On a CPU, the same bits for any
        number of threads.

    Source: Gargiulo et al. 2024, arXiv:2412.00081.
    """
    return _run("tsv", models, base, out, locals(), ("scaling",))


def iso_c(
    models: Sequence[Model],
    base: Model,
    *,
    scaling: SupportsFloat = 1.0,
    non_finite: NonFinite = "error",
    backend: Backend = "auto",
    out: Model | None = None,
) -> Model:
    """Give the sum of the task vectors a flat spectrum (Iso-C).

    With sum_k (models[k] - base) = U S V^T:

        out = base + scaling * mean(S) U V^T

    over the singular values above rounding. Rules X1 to X3 and X7 of docs/spec/matrix.md.

    models, base: as for `pymerge.wudi`; the same in either orientation of a weight.
    scaling: the paper's alpha.
    non_finite, backend, out, result, errors: as for `pymerge.wudi`. On a CPU, the same bits for any
        number of threads.

    Source: Marczak et al. 2025, arXiv:2502.04959.
    """
    return _run("iso_c", models, base, out, locals(), ("scaling",))
