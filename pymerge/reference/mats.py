"""`mats`, `regmean` and `weighted_average` in plain PyTorch float64, one line per rule of
docs/spec/mats.md. Written to be right and readable, not fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pymerge.rules.mats import DAMPING_RAISES, MatsRule, kronecker_shares, raised, task_weights

Tensors = Sequence[torch.Tensor]


def mats(
    weights: Tensors,
    input_grams: Tensors,
    output_grams: Tensors | None,
    rule: MatsRule,
    init: torch.Tensor,
) -> tuple[torch.Tensor, str, int]:
    """One layer by M1 to M11 in float64. Returns (X, status, iterations)."""
    w = [x.double() for x in weights]
    a = [scaled(g.double(), rule.off_diagonal) for g in input_grams]
    b = (
        None
        if output_grams is None
        else [scaled(g.double(), rule.off_diagonal) for g in output_grams]
    )
    start = init.double()
    if not all(bool(g.isfinite().all()) for g in (*a, *(b or ()), *w)):
        return start, "non_finite", 0
    if any(
        float(g.diagonal().min()) < -1e-6 * float(g.diagonal().abs().max())
        for g in (*a, *(b or ()))
    ):
        return start, "not_positive", 0  # N5
    t = weights_of(a, b, rule)
    if not sum(float(g.trace()) for g in a) > 0 or not any(t):
        return start, "no_statistics", 0
    if rule.solver == "exact":
        return exact(w, a, b, t, start), "exact", 0
    return conjugate_gradient(w, a, b, t, rule, start)


def scaled(gram: torch.Tensor, factor: float) -> torch.Tensor:
    """M2."""
    return factor * gram + (1 - factor) * torch.diag(gram.diagonal())


def weights_of(a: Tensors, b: Tensors | None, rule: MatsRule) -> tuple[float, ...]:
    """M3."""
    traces_b = None if b is None else [float(g.trace()) for g in b]
    return task_weights(rule.task_weights, [float(g.trace()) for g in a], traces_b)


def operator(x: torch.Tensor, a: Tensors, b: Tensors | None, t: Sequence[float]) -> torch.Tensor:
    """M1: sum_k w_k B_k X A_k."""
    total = torch.zeros_like(x)
    for k, (weight, gram) in enumerate(zip(t, a, strict=True)):
        product = x @ gram
        total = total + weight * (product if b is None else b[k] @ product)
    return total


def right_side(w: Tensors, a: Tensors, b: Tensors | None, t: Sequence[float]) -> torch.Tensor:
    """M1: sum_k w_k B_k W_k A_k."""
    total = torch.zeros_like(w[0])
    for k, (weight, x, gram) in enumerate(zip(t, w, a, strict=True)):
        product = x @ gram
        total = total + weight * (product if b is None else b[k] @ product)
    return total


def objective(
    x: torch.Tensor, w: Tensors, a: Tensors, b: Tensors | None, t: Sequence[float]
) -> float:
    """M1: f(X)."""
    total = 0.0
    for k, (weight, y, gram) in enumerate(zip(t, w, a, strict=True)):
        product = (x - y) @ gram
        total += weight * float(((x - y) * (product if b is None else b[k] @ product)).sum()) / 2
    return total


def dense_matrix(a: Tensors, b: Tensors | None, t: Sequence[float]) -> torch.Tensor:
    """M1 as one matrix over the row-major elements of X: sum_k w_k B_k (x) A_k."""
    if b is None:
        return sum(
            (weight * gram for weight, gram in zip(t, a, strict=True)), torch.zeros_like(a[0])
        )
    parts = [weight * torch.kron(y, x) for weight, x, y in zip(t, a, b, strict=True)]
    return sum(parts[1:], parts[0])


def exact(
    w: Tensors, a: Tensors, b: Tensors | None, t: Sequence[float], start: torch.Tensor
) -> torch.Tensor:
    """The solution nearest to `start` (M5), by the pseudoinverse of the dense matrix. For small
    layers.
    """
    rest = right_side(w, a, b, t) - operator(start, a, b, t)
    inverse = torch.linalg.pinv(dense_matrix(a, b, t), rtol=1e-13, hermitian=True)
    if b is None:
        return start + rest @ inverse
    return start + (inverse @ rest.reshape(-1)).reshape(rest.shape)


class Preconditioner:
    """M7. With infinite damping, or if none is asked for, P = I."""

    def __init__(
        self, a: Tensors, b: Tensors | None, t: Sequence[float], rule: MatsRule, damping: float
    ) -> None:
        self.left: torch.Tensor | None = None
        self.right: torch.Tensor | None = None
        if not rule.preconditioner:
            return
        traces_b = None if b is None else [float(gram.trace()) for gram in b]
        shares_a, shares_b = kronecker_shares(t, [float(gram.trace()) for gram in a], traces_b)
        self.right = damped_inverse(a, shares_a, damping)
        if b is not None:
            self.left = damped_inverse(b, shares_b, damping)

    def __call__(self, r: torch.Tensor) -> torch.Tensor:
        z = r if self.right is None else r @ self.right
        return z if self.left is None else self.left @ z


def damped_inverse(grams: Tensors, shares: Sequence[float], damping: float) -> torch.Tensor:
    """M7: (sum of shares times Grams + damping times its mean diagonal)^-1."""
    total = torch.zeros_like(grams[0])
    for share, gram in zip(shares, grams, strict=True):
        total = total + share * gram
    shift = damping * float(total.diagonal().mean())
    return torch.linalg.inv(
        total + shift * torch.eye(len(total), dtype=total.dtype, device=total.device)
    )


def conjugate_gradient(
    w: Tensors,
    a: Tensors,
    b: Tensors | None,
    t: Sequence[float],
    rule: MatsRule,
    start: torch.Tensor,
) -> tuple[torch.Tensor, str, int]:
    """M6 to M10."""
    right = right_side(w, a, b, t)
    rest = right - operator(start, a, b, t)
    mean = sum(w[1:], w[0]) / len(w)
    one = torch.eye(1, dtype=torch.float32, device="cpu")
    pairs = zip(t, a, b or [one] * len(a), strict=True)
    level = (
        sum(float(x.trace() * y.trace()) * v for v, x, y in pairs)
        / start.shape[1]
        / len(b[0] if b else [1])
    )
    small = max(
        rule.residual_tolerance * float(right.norm()),
        2.0**-53 * level * max(float((x - start).norm()) for x in w),
    )
    limit = rule.step_limit * max(float((x - mean).norm()) for x in w)
    step, done, decrease = torch.zeros_like(start), 0, 0.0
    damping, status = rule.damping, "iterations"
    for _ in range(DAMPING_RAISES + 1):
        precondition = Preconditioner(a, b, t, rule, damping)
        r = rest - operator(step, a, b, t)
        z = precondition(r)
        p, rho = z, float((r * z).sum())
        status = "iterations"
        while done < rule.iterations:
            if float(r.norm()) <= small:
                status = "converged"
                break
            q = operator(p, a, b, t)
            curvature = float((p * q).sum())
            if not (0 < curvature < math.inf and 0 < rho < math.inf):
                status = "breakdown"
                break
            alpha = rho / curvature
            if float((step + alpha * p).norm()) > limit:
                alpha, status = to_boundary(step, p, limit), "step_limit"
            step, r, done = step + alpha * p, r - alpha * q, done + 1
            gain = alpha * rho - alpha * alpha * curvature / 2
            decrease += gain
            if status == "step_limit":
                break
            if gain <= rule.objective_tolerance * decrease or float(r.norm()) <= small:
                status = "converged"
                break
            z = precondition(r)
            rho_next = float((r * z).sum())
            p, rho = z + (rho_next / rho) * p, rho_next
        most = objective(start, w, a, b, t)  # M10
        moved = most - objective(start + step, w, a, b, t)
        if float(step.norm()) > 0 and not 0 < moved <= most * (1 + 1e-6):
            status, step, done, decrease = "breakdown", torch.zeros_like(step), 0, 0.0
        if status != "breakdown" or not rule.preconditioner:
            break
        damping = raised(damping)
    if status == "breakdown" and not done:
        return start, "initialisation", 0
    return start + step, status, done


def to_boundary(step: torch.Tensor, p: torch.Tensor, limit: float) -> float:
    """M8: the positive alpha with ||step + alpha p|| = limit."""
    dp, pp, dd = (float((x * y).sum()) for x, y in ((step, p), (p, p), (step, step)))
    return (-dp + math.sqrt(dp * dp + pp * (limit * limit - dd))) / pp


def regmean(
    weights: Tensors,
    input_grams: Tensors,
    init: torch.Tensor,
    off_diagonal: float = 1.0,
    shares: Sequence[float] | None = None,
) -> torch.Tensor:
    """M14."""
    a = [scaled(g.double(), off_diagonal) for g in input_grams]
    return exact([x.double() for x in weights], a, None, shares or [1.0] * len(a), init.double())


def weighted_average(
    weights: Tensors,
    fishers: Tensors,
    init: torch.Tensor,
    minimum: float = 0.0,
    shares: Sequence[float] | None = None,
) -> torch.Tensor:
    """M15; N1 and N2 as for the other methods. shares: w_k."""
    if not all(bool(x.isfinite().all()) for x in (*weights, *fishers)):
        return init.double()
    top, bottom = torch.zeros_like(init.double()), torch.zeros_like(init.double())
    positive = torch.ones_like(bottom, dtype=torch.bool)
    for share, x, f in zip(shares or [1.0] * len(weights), weights, fishers, strict=True):
        part = share * f.double().clamp(min=minimum)
        top, bottom, positive = top + part * x.double(), bottom + part, positive & (f >= 0)  # N5
    quotient = top / bottom
    return torch.where(positive & (bottom != 0) & quotient.isfinite(), quotient, init.double())
