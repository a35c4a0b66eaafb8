"""The operator of `mats` over stacked layers of equal shape, as GEMMs, and its preconditioner (M1,
M7, M13).

Layout, per layer: the A_k lie one behind the other, (K, d_in, d_in); the B_k side by side, (d_out,
K d_out). So 𝓐(X) is one batched product X A_k, (K, d_out, d_in), read as (K d_out, d_in), and one
product with the wide B: 2K products of the plain size, nothing transposed or added in between. Task
weights and a power of two that brings the system to unit scale are folded into B.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pymerge.rules.mats import (
    DAMPING_FACTOR,
    MatsRule,
    kronecker_shares,
    task_weights,
    trace_products,
)

# Stacked layers below this width are multiplied in one batched call on the CPU; wider ones one by
# one, where a single product fills the cores and no copy of X is wanted.
_BATCHED_BELOW = 192


@dataclass
class System:
    """𝓐 for L layers. All tensors in the working dtype, on one device.

    a: (L, K, d_in, d_in) for the right side and, with b, for 𝓐; L may be an expanded dimension
        (layers that share inputs).
    b: (L, d_out, K d_out), weighted and scaled; None for RegMean's system.
    total_a: (L, d_in, d_in), sum of w_k A_k times the scale, where b is None.
    scale: (L,) the powers of two folded in. weights, products: per layer, w_k and tr A_k tr B_k.
    mean_a, mean_b: (L, d, d) of M7, undamped; mean_b None without b.
    """

    a: torch.Tensor
    b: torch.Tensor | None
    total_a: torch.Tensor | None
    scale: torch.Tensor
    weights: list[tuple[float, ...]]
    products: list[list[float]]
    mean_a: torch.Tensor
    mean_b: torch.Tensor | None

    @property
    def shared(self) -> bool:
        """Whether all layers read the same A."""
        return self.a.shape[0] > 1 and self.a.stride(0) == 0

    def layer(self, index: int) -> System:
        """One layer of the stack, as views."""
        at = slice(index, index + 1)
        return System(
            self.a[at],
            None if self.b is None else self.b[at],
            None if self.total_a is None else self.total_a[at],
            self.scale[at],
            self.weights[at],
            self.products[at],
            self.mean_a[at],
            None if self.mean_b is None else self.mean_b[at],
        )

    def level(self, index: int) -> float:
        """s of M8 of one layer: the mean of sum_k w_k tr A_k tr B_k over its elements."""
        total = sum(w * t for w, t in zip(self.weights[index], self.products[index], strict=True))
        d_out = 1 if self.b is None else self.b.shape[1]
        return total / (self.a.shape[-1] * d_out)

    def apply_each(self, w: torch.Tensor) -> torch.Tensor:
        """sum_k w_k B_k W_k A_k for w of shape (L, K, d_out, d_in): (L, d_out, d_in)."""
        return self.apply_apart(w)[0]

    def apply_apart(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`apply_each`, and (L,) sum_k w_k <W_k, B_k W_k A_k> / 2: with W_k - X0 for W_k, R0 and
        f(X0).
        """
        layers, count, d_out, d_in = w.shape
        out = w.new_zeros(layers, d_out, d_in)
        part = w.new_empty(d_out, d_in)
        energy = torch.zeros(layers, dtype=torch.float64, device=w.device)
        with _matmul_mode("fp32", w.device):
            for i in range(layers):
                for k in range(count):
                    if self.b is None:
                        share = self.scale[i].to(w.dtype) * self.weights[i][k]
                        torch.mm(w[i, k] * share, self.a[i, k], out=part)
                    else:
                        columns = self.b[i][:, k * d_out : (k + 1) * d_out]
                        torch.mm(columns, w[i, k] @ self.a[i, k], out=part)
                    out[i].add_(part)
                    energy[i] += torch.linalg.vecdot(w[i, k].reshape(-1), part.view(-1)).double()
        return out, energy / 2


def build(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor] | None,
    rule: MatsRule,
    dtype: torch.dtype,
    layers: int = 1,
) -> System:
    """Stack L layers. a: one (K, d_in, d_in) tensor per layer, or a single one that all share. b:
    one per layer.
    """
    factor = rule.off_diagonal
    if len(a) == 1:  # a large layer's Grams are not copied
        stack_a = scaled(a[0].to(dtype), factor)[None]
    else:
        stack_a = torch.stack([scaled(x.to(dtype), factor) for x in a])
    traces_a = _traces(stack_a).expand(layers, -1)
    if layers > len(a):
        stack_a = stack_a.expand(layers, -1, -1, -1)
    count, d_in = stack_a.shape[1:3]
    traces_b = None if b is None else torch.stack([_traces(x.to(torch.float64)) for x in b])
    host_a = traces_a.tolist()
    host_b = None if traces_b is None else traces_b.tolist()
    weights, products, scales, shares_a, shares_b = [], [], [], [], []
    for i in range(layers):
        row_b = None if host_b is None else host_b[i]
        w = task_weights(rule.task_weights, host_a[i], row_b)
        weights.append(w)
        products.append(trace_products(host_a[i], row_b))
        mean_shares = kronecker_shares(w, host_a[i], row_b)
        shares_a.append(mean_shares[0])
        shares_b.append(mean_shares[1])
        d_out = 1 if b is None else b[i].shape[-1]
        level = sum(x * y for x, y in zip(w, products[i], strict=True)) / (d_in * d_out)
        # Without B the scale multiplies A in one step, so it must be representable in fp32.
        scales.append(_power_of_two(level, 126 if b is None else 240))
    scale = torch.tensor(scales, dtype=torch.float64, device=stack_a.device)
    mean_a = _weighted(stack_a, [_normal(row) for row in shares_a])
    if b is None:
        total = _weighted(
            stack_a, [[x * s for x in w] for w, s in zip(weights, scales, strict=True)]
        )
        return System(stack_a, None, total, scale, weights, products, mean_a, None)
    d_out = b[0].shape[-1]
    wide = torch.empty(layers, d_out, count, d_out, dtype=dtype, device=stack_a.device)
    mean_b = torch.zeros(layers, d_out, d_out, dtype=dtype, device=stack_a.device)
    for i, grams in enumerate(b):
        normal = _normal(shares_b[i])
        for k in range(count):
            gram = scaled(grams[k].to(dtype), factor)
            mean_b[i].add_(gram, alpha=normal[k])
            # Gram matrices are symmetric: B_k may stand where its transpose should. The scale in
            # two factors: 2^150 is beyond fp32, and B times it is not.
            half = 2.0 ** (math.frexp(scales[i])[1] // 2)
            torch.mul(gram, weights[i][k] * half, out=wide[i, :, k, :]).mul_(scales[i] / half)
    flat = wide.reshape(layers, d_out, count * d_out)
    return System(stack_a, flat, None, scale, weights, products, mean_a, mean_b)


class Operator:
    """X -> 𝓐(X) for all layers of a system in one precision, without allocating memory (M13)."""

    def __init__(self, system: System, d_out: int, precision: str) -> None:
        self.system, self.precision = system, precision
        layers, count, d_in = system.a.shape[:3]
        first = system.a if system.b is not None else system.total_a
        assert first is not None
        self._first, self._second = first, system.b
        if precision == "bf16x3":
            self._first, self._second = (
                _split_right(first),
                None if system.b is None else _split_left(system.b),
            )
        self._batched = layers > 1 and (
            first.device.type != "cpu" or max(d_out, d_in) < _BATCHED_BELOW
        )
        self._inner: torch.Tensor | None = None
        if system.b is not None:
            held = layers if self._batched else 1
            self._inner = first.new_empty(held, count, d_out, d_in)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x, out: (L, d_out, d_in), contiguous, not the same memory."""
        with _matmul_mode(self.precision, x.device):
            if self.precision == "bf16x3":
                return self._split_product(x, out)
            if self._inner is None:
                return torch.bmm(x, self._first, out=out)
            assert self._second is not None
            layers, d_out, d_in = x.shape
            count = self._first.shape[1]
            if self._batched:
                torch.matmul(x[:, None], self._first, out=self._inner)
                return torch.bmm(
                    self._second, self._inner.view(layers, count * d_out, d_in), out=out
                )
            inner = self._inner[0]
            for i in range(layers):
                torch.bmm(x[i].expand(count, -1, -1), self._first[i], out=inner)
                torch.mm(self._second[i], inner.view(count * d_out, d_in), out=out[i])
            return out

    def _split_product(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        wide = _split_left(x)
        if self._inner is None:
            return out.copy_(_product(wide, self._first))
        assert self._second is not None
        layers, d_out, d_in = x.shape
        for i in range(layers):
            count = self._first.shape[1]
            inner = _product(wide[i].expand(count, -1, -1), self._first[i])
            tall = _split_right(inner.view(count * d_out, d_in))
            out[i].copy_(_product(self._second[i][None], tall[None])[0])
        return out


class Preconditioner:
    """M7: explicit inverses, applied as two products; the identity where the rule asks for none."""

    def __init__(self, system: System, rule: MatsRule, damping: float) -> None:
        self.damping = damping
        self.right: torch.Tensor | None = None
        self.left: torch.Tensor | None = None
        self._inner: torch.Tensor | None = None
        if not rule.preconditioner:
            return
        means = system.mean_a
        shared = means.shape[0] > 1 and means.stride(0) == 0
        right, used = damped_inverse(means[:1] if shared else means, damping)
        self.right = right.expand(means.shape[0], -1, -1) if shared else right
        if system.mean_b is not None:
            self.left, used_b = damped_inverse(system.mean_b, damping)
            used = max(used, used_b)
        self.damping = used

    def __call__(self, r: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self.right is None:
            return out.copy_(r)
        with _matmul_mode("fp32", r.device):
            if self.left is None:
                return torch.bmm(r, self.right, out=out)
            if self._inner is None:
                self._inner = torch.empty_like(r)
            torch.bmm(r, self.right, out=self._inner)
            return torch.bmm(self.left, self._inner, out=out)

    @property
    def identity(self) -> bool:
        return self.right is None


def damped_inverse(means: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """(M + damping * mean diagonal * I)^-1 for (L, d, d), by Cholesky. Returns it and the damping
    that it took.

    Matrices made indefinite by rounding get ten times the damping until they factor; one with no
    positive mean diagonal gives 0.
    """
    level = _mean_diagonal(means).clamp(min=torch.finfo(means.dtype).tiny)[:, None, None]
    # fp32 factors of a matrix damped by less than this have no correct digit left in their small
    # eigenvalues.
    work = means.double() if damping < 1e-3 else means
    used = damping
    for _ in range(20):
        damped = work / level
        damped.diagonal(dim1=-2, dim2=-1).add_(used)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            inverse = torch.cholesky_inverse(factor)
            if (
                inverse.device.type == "cpu"
            ):  # LAPACK's triangle, mirrored by torch, in Fortran's order
                return inverse.mT.to(means.dtype), used
            lower = inverse.tril()
            return (lower + lower.tril(-1).mT).to(means.dtype), used
        used = max(used * DAMPING_FACTOR, 1e-7)
    return torch.zeros_like(means), used


def working_precision(precision: str | None, weights: Sequence[torch.Tensor]) -> str:
    """M13."""
    if precision is not None:
        return precision
    return "fp64" if any(w.dtype == torch.float64 for w in weights) else "fp32"


def scaled(grams: torch.Tensor, factor: float) -> torch.Tensor:
    """M2 of (..., d, d) matrices; the input itself where nothing changes."""
    if factor == 1:
        return grams
    less = grams * factor
    less.diagonal(dim1=-2, dim2=-1).copy_(grams.diagonal(dim1=-2, dim2=-1))
    return less


def _traces(grams: torch.Tensor) -> torch.Tensor:
    return grams.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)


def _mean_diagonal(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).mean(-1)


def _weighted(stack: torch.Tensor, shares: Sequence[Sequence[float]]) -> torch.Tensor:
    """sum_k shares[l][k] stack[l, k]: (L, d, d); one expanded matrix where layers share both."""
    layers = len(shares)
    same = stack.stride(0) == 0 and all(list(row) == list(shares[0]) for row in shares)
    rows = shares[:1] if same else shares
    out = stack.new_zeros(len(rows), *stack.shape[2:])
    for i, row in enumerate(rows):
        for k, share in enumerate(row):
            out[i].add_(stack[i, k], alpha=share)
    return out.expand(layers, -1, -1) if same else out


def _normal(shares: Sequence[float]) -> list[float]:
    """Shares scaled to the sum 1, so that sums over models stay in range."""
    total = sum(shares)
    return [s / total for s in shares] if total > 0 and math.isfinite(total) else list(shares)


def _power_of_two(level: float, most: int) -> float:
    """The power of two nearest to 1 / level, at most 2^most either way; 1 for a level of 0."""
    if not (level > 0 and math.isfinite(level)):
        return 1.0
    return 2.0 ** min(most, max(-most, -round(math.log2(level))))


def full_products(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Without TF32, whatever the process has set."""
    return _matmul_mode("fp32", device)


@contextlib.contextmanager
def _matmul_mode(precision: str, device: torch.device) -> Iterator[None]:
    """Inside, TF32 is on or off as asked, whatever the process has set by either of torch's two
    settings. From torch 2.9 on, reading the older one raises where the newer was used.
    """
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    name = "allow_tf32"
    value: bool | str = precision == "tf32"
    if hasattr(settings, "fp32_precision"):
        name, value = "fp32_precision", "tf32" if value else "ieee"
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x as the sum of two bf16 numbers, up to a remainder of 2^-16 of it."""
    high = x.to(torch.bfloat16)
    low = (x - high.to(x.dtype)).to(torch.bfloat16)
    if x.device.type == "cuda":
        return high, low
    return high.to(x.dtype), low.to(x.dtype)  # bf16 values; their fp32 products are exact


def _split_left(x: torch.Tensor) -> torch.Tensor:
    """[high | high | low] along the columns, to be multiplied with [high; low; high] of
    `_split_right`.
    """
    high, low = _halves(x)
    return torch.cat((high, high, low), dim=-1)


def _split_right(x: torch.Tensor) -> torch.Tensor:
    high, low = _halves(x)
    return torch.cat((high, low, high), dim=-2)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype == torch.bfloat16:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left, right)
