"""Measures one tensor, or a part of one, block by block where its models lie.

Products come from the op `gram`, thresholds from `select`; what is counted is counted by torch on
blocks of a few MB. Everything is decided as T1 to T5 of docs/spec/ties.md say.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pymerge.analysis.blocks import (
    Block,
    Tensors,
    blocks_of,
    column,
    elected,
    keeps_all,
    resolved,
    single_thread,
)
from pymerge.analysis.figures import Figures
from pymerge.engine.tensor_ops import merge_tensor
from pymerge.ops.gram.api import gram_checked
from pymerge.reference.ties import working_dtype
from pymerge.rules.options import OpOptions
from pymerge.rules.ties import TiesRule

# Magnitudes that are held until they are counted.
_HELD = 1 << 20
# Magnitudes are counted by the upper bits of their fp32 value: 9 bits of the fraction, so that a
# bin's middle is within 2^-10 of every magnitude in it.
_SHIFT = 14
_BINS = 1 << 17
_MOST = torch.finfo(torch.float32).max


class _Magnitudes:
    """How many magnitudes there are of each size, for every model. elements: of the tensor."""

    def __init__(self, models: int, elements: int) -> None:
        held = min(elements, max(1, _HELD // models))
        self._held = torch.empty(models, held, dtype=torch.int32, device="cpu")
        self._used = 0
        self._bins: torch.Tensor | None = None  # once there are more than are held

    def add(self, sizes: torch.Tensor) -> None:
        """(K, count), finite."""
        narrow = sizes.cpu()
        if sizes.dtype != torch.float32:
            narrow = narrow.clamp(max=_MOST).float()
        most = self._held.shape[1]
        for piece in torch.split(narrow.view(torch.int32), most, 1) if most else ():
            if self._used + piece.shape[1] > most:
                self._count()
            place = self._held[:, self._used : self._used + piece.shape[1]]
            torch.bitwise_right_shift(piece, _SHIFT, out=place)
            self._used += piece.shape[1]

    def _count(self) -> None:
        """Count what is held."""
        models = len(self._held)
        if self._bins is None:
            self._bins = torch.zeros(models, _BINS, dtype=torch.int64, device="cpu")
        for row, bins in zip(self._held, self._bins, strict=True):
            bins += torch.bincount(row[: self._used], minlength=_BINS)
        self._used = 0

    def largest_first(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(number in it, magnitude that stands for it) of each bin of model k that is used."""
        if self._bins is None:
            used, counts = torch.unique(self._held[k, : self._used], return_counts=True)
        else:
            if self._used:
                self._count()
            used = self._bins[k].nonzero()[:, 0]
            counts = self._bins[k, used]
        return counts.flip(0), _middles(used).flip(0)


class TensorMeasure:
    """Adds up the figures of one tensor, part by part.

    rule: how `ties` merges it; None for another op, whose options then say how it is merged, or
        for a result that is not made here.
    """

    def __init__(
        self,
        models: int,
        elements: int,
        rule: TiesRule | None,
        densities: tuple[float, ...],
        options: OpOptions | None = None,
        name: str = "",
    ) -> None:
        self.figures = Figures(models, densities, tensors=1)
        self._rule = rule
        self._options = options
        self._name = name
        self._magnitudes = _Magnitudes(models, elements)
        # <delta_k, u>, of a result that another op makes.
        self._with_update = torch.zeros(models, dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def add(
        self, models: Tensors, base: torch.Tensor | None, first: int = 0, whole: bool = True
    ) -> None:
        """Measure the elements from `first` on. whole: whether these are all."""
        found, count = self.figures, len(models)
        rule = self._rule
        if rule is None:
            rule = keeps_all(count)
        elif whole:
            rule = resolved(rule, models, base)
        else:
            rule = rule.part(first, models[0].numel())
        found.elements += models[0].numel()
        found["considered"].add_(models[0].numel())
        clean = True
        with single_thread():
            for block in blocks_of(rule, models, base):
                clean &= block.bad is None
                self._count(block, rule)
        self._products(models, base, rule if not clean else None)
        if self._options is not None:
            self._update(models, base)

    def _count(self, block: Block, rule: TiesRule) -> None:
        found, bad, masks = self.figures, block.bad, block.masks
        count = len(masks)
        numbers = block.numbers(masks)
        both = (numbers @ numbers.T).long().cpu()  # exact: a block has fewer than 2^24 elements
        found["both_kept"].add_(both)
        found["kept"].add_(both.diagonal())
        sizes = block.sizes
        if bad is not None:
            found["non_finite"].add_(bad.sum(1).cpu())
            sizes = sizes.masked_fill(bad, 0)
        torch.maximum(found["largest"], block.largest.double().cpu(), out=found["largest"])
        self._magnitudes.add(sizes)

        trimmed = block.trimmed()
        votes = block.votes(trimmed)
        above = torch.gt(votes, 0, out=block.buffer("above", torch.bool))
        below = torch.lt(votes, 0, out=block.buffer("below", torch.bool))
        dtype = torch.uint8 if (count + 1) ** 2 <= 256 else torch.int32
        code = torch.zeros(masks.shape[1], dtype=dtype, device=masks.device)
        for plus, minus in zip(above, below, strict=True):
            code.add_(plus.view(torch.uint8), alpha=count + 1).add_(minus.view(torch.uint8))
        signs = torch.bincount(code, minlength=(count + 1) ** 2).cpu()
        found["signs"].add_(signs.reshape(count + 1, count + 1))
        if self._rule is None:
            found["agreed"].add_(both.diagonal())
            return
        agree = masks
        if rule.elect != "none":
            total = elected(votes, rule)
            positive = rule.zero_sign == "positive" or rule.majority > 0
            plus = total >= 0 if positive else total > 0
            if bad is not None and positive:
                plus |= total.isnan()
            agree = above.logical_and_(plus).logical_or_(below.logical_and_(~plus))
        parts = self._parts(block, trimmed, agree)
        if bad is not None:
            parts[:, bad.any(0)] = 0
        update = parts.sum(0)
        found["parts"].add_((parts @ update).cpu())
        found.update_square += float(update @ update)

    def _parts(self, block: Block, trimmed: torch.Tensor, agree: torch.Tensor) -> torch.Tensor:
        """(K, count): what each model adds to scaling * merged (T5)."""
        rule = block.rule
        made = block.buffer("parts", trimmed.dtype)
        weights = column(rule.weights, made)
        block.only(torch.mul(trimmed, weights, out=made), agree)
        numbers = block.numbers(agree)
        self.figures["agreed"].add_(numbers.sum(1).long().cpu())
        if rule.merge == "max":
            best, owner = torch.zeros_like(made[0]), torch.full_like(made[0], -1)
            for k, product in enumerate(made):
                larger = product.abs() > best.abs()
                best, owner = torch.where(larger, product, best), owner.masked_fill(larger, k)
            order = torch.arange(len(made), dtype=owner.dtype, device=owner.device)
            made.masked_fill_(owner != order[:, None], 0)
        elif rule.merge == "mean":
            made /= numbers.mul_(trimmed != 0).sum(0).clamp_(min=1)
        elif rule.merge == "weighted_mean" and rule.elect == "none":
            divisor = weights.sum()
            made /= torch.where(divisor.abs() < 1e-8, 1, divisor)
        elif rule.merge == "weighted_mean":
            divisor = numbers.mul_(weights).sum(0)
            made /= divisor.add_(divisor == 0)  # 0 becomes 1
        return made if rule.scaling == 1 else made.mul_(rule.scaling)

    def _products(
        self, models: Tensors, base: torch.Tensor | None, with_gaps: TiesRule | None
    ) -> None:
        """The products of task vectors; block by block where some are not finite and count as 0."""
        found, count = self.figures, len(models)
        if with_gaps is None:
            pairs = gram_checked(models, base, "tensor", "auto")[0].cpu()
            found["products"].add_(_symmetric(pairs, count))
        else:
            for block in blocks_of(with_gaps, models, base):
                bad = block.bad
                clean = (block.deltas if bad is None else block.deltas.masked_fill(bad, 0)).double()
                found["products"].add_((clean @ clean.T).cpu())
        if base is not None:
            square = gram_checked([base], None, "tensor", "auto")[0].cpu()
            found["base_square"].add_(square)

    def _update(self, models: Tensors, base: torch.Tensor | None) -> None:
        """What an op other than `ties` makes of the tensor, against the task vectors."""
        assert self._options is not None
        like = models[0] if base is None else base
        work = working_dtype(models)  # not rounded to the result's dtype
        made = torch.empty(like.shape, dtype=work, device=like.device)
        merge_tensor(models, base, self._options, made, self._name)
        pairs = gram_checked([*models, made], base, "tensor", "auto")[0].cpu()
        count = len(models)
        full = _symmetric(pairs, count + 1)
        if bool(full.isfinite().all()):
            self._with_update += full[:count, count]
            self.figures.update_square += float(full[count, count])

    def finish(self) -> Figures:
        """The figures, once all parts were added."""
        found = self.figures
        if self._options is not None:
            solved = torch.linalg.pinv(found["products"], hermitian=True) @ self._with_update
            found["parts"].copy_(solved * self._with_update)
        for k in range(len(found["mass"])):
            _mass(found, k, *self._magnitudes.largest_first(k))
        return found


def _symmetric(pairs: torch.Tensor, count: int) -> torch.Tensor:
    """The matrix whose upper triangle `gram_checked` gives."""
    rows, columns = torch.triu_indices(count, count, dtype=torch.int64, device="cpu")
    full = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    full[rows, columns] = pairs
    full[columns, rows] = pairs
    return full


def _mass(found: Figures, k: int, counts: torch.Tensor, middles: torch.Tensor) -> None:
    """The sums of the largest magnitudes, from how many are in each bin, the largest first."""
    through = counts.cumsum(0)
    total = (counts * middles).cumsum(0)
    found["mass"][k] += total[-1] if len(total) else 0
    wanted = [int(d * found.elements) for d in found.densities]
    ranks = torch.tensor(wanted, dtype=torch.int64, device="cpu")
    at = torch.searchsorted(through, ranks)
    for place, (rank, bin_) in enumerate(zip(ranks.tolist(), at.tolist(), strict=True)):
        if rank:
            before = bin_ - 1  # the last one that is taken whole
            whole, taken = (total[before], int(through[before])) if bin_ else (0.0, 0)
            found["mass_above"][k, place] += whole + (rank - taken) * middles[bin_]


def _middles(bins: torch.Tensor) -> torch.Tensor:
    """The magnitude that stands for each bin; 0 for the first, which holds the zeros."""
    low, high = ((bins.int() + step << _SHIFT).view(torch.float32).double() for step in (0, 1))
    # Of the last bin the end would be infinite.
    middles = torch.where(high.isfinite(), (low + high) / 2, low)
    return middles.masked_fill(bins == 0, 0)


@torch.no_grad()
def measure_alignment(
    figures: Figures,
    weights: Tensors,
    base: torch.Tensor | None,
    grams: Callable[[int], torch.Tensor | None],
    transposed: bool,
) -> None:
    """Add what the inputs of each task see of each task vector.

    weights, base: (d_out, d_in), or (d_in, d_out) where transposed. grams: the mean of model j's
        input Gram matrices, (d_in, d_in), or None.
    """
    rows = max(1, _HELD // max(1, weights[0].shape[1]))
    for j in range(len(weights)):
        gram = grams(j)
        if gram is None or not float(gram.trace()) > 0:
            continue
        wide = gram.double()
        scale = float(len(wide) / wide.trace())
        for i, weight in enumerate(weights):
            delta = weight.T if transposed else weight
            start = base.T if base is not None and transposed else base
            for begin in range(0, len(delta), rows):
                own = delta[begin : begin + rows].double()
                if start is not None:
                    own = own - start[begin : begin + rows].double()
                own = torch.where(own.isfinite(), own, 0)
                figures["seen"][i, j] += float(((own @ wide) * own).sum()) * scale
                figures["seen_square"][i, j] += float(own.square().sum())
