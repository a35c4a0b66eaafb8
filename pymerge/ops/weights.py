"""What the tensors of a model are, by names, shapes and dtypes: weights, codes of quantised
weights, factors of adapters, running statistics of normalisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from pymerge.dtypes import INTEGERS, MERGEABLE
from pymerge.messages.words import names_with_verb, some_names
from pymerge.rules.ties import TiesOptions


class Described(Protocol):
    """A tensor as a header gives it. dtype: torch's name, as "bfloat16"."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


# Integer tensors that are not codes: indices and masks.
_PLAIN = (*MERGEABLE, "int64", "uint64", "bool")
_CONSTANT = re.compile(
    r"(_ids|_index|_indices|_idxs?|mask|anchors|(^|\.)attn\.bias|(^|\.)masked_bias)$"
)
# Marlin's are `B` beside `s`.
_CODES = re.compile(r"(^|\.)(qweight|qzeros|q_weight|weight_packed|W_q|Qidxs|col_vals|B)$")
# The last part of names that stand beside codes: `scales`, `weight_scale_inv`, `absmax`, `SCB`.
_SCALES = re.compile(
    r"(^|_)"
    r"(q?scales?|s|scb|absmax|quant_map|q?zeros?|zero_points?|codebooks?|centroids|invperm|suh)"
    r"(_|$)",
    re.I,
)
_WEIGHT = (".weight", ".kernel")
# Of peft (LoRA, DoRA, AdaLoRA, VeRA, OFT), kohya, diffusers and LyCORIS. (IA)^3 is not among them:
# its vectors are no factors of one another.
_FACTOR = re.compile(
    r"(?:^|[._])("
    r"lora_(?:A|B|E|down|up|mid|embedding_A|embedding_B|magnitude_vector)|lora\.(?:down|up)"
    r"|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|dora_scale|vera_lambda_[bd]"
    r"|oft_(?:blocks|diag|R|r)|boft_[RS])(?=[._]|$)",
    re.M,
)

HOLDS_ADAPTER = "holds an adapter, not a model"
_RUNNING = (".running_mean", ".running_var")


def is_running(name: str) -> bool:
    """Whether a tensor is a running mean or variance. Adding differences to a variance could make
    it negative, so that these are averaged (E3 of docs/spec/ties.md).
    """
    return f".{name}".endswith(_RUNNING)


def averaged(names: Sequence[str], method: str) -> str:
    """What is noted of running statistics."""
    return (
        f"{names_with_verb(names)} averaged over the models: running statistics of normalisation,"
        f" which {method} could make negative"
    )


def mean_of(count: int, non_finite: str) -> TiesOptions:
    """The plain mean of so many models, which running statistics get."""
    return TiesOptions(
        densities=(1.0,) * count,
        weights=(1.0,) * count,
        gammas=(0.0,) * count,
        epsilons=(0.0,) * count,
        scaling=1.0,
        flavor="mergekit",
        trim="none",
        elect="none",
        merge="weighted_mean",
        zero_sign="positive",
        scope="tensor",
        rescale="none",
        seed=0,
        non_finite=non_finite,
    )


def codes_in(tensors: Mapping[str, Described]) -> dict[str, Described]:
    """The tensors whose dtype is one that codes of quantised weights have."""
    return {
        name: info
        for name, info in tensors.items()
        if info.dtype not in _PLAIN and info.shape and not _CONSTANT.search(name)
    }


def quantised(why: str) -> str:
    """The predicate of a sentence about a quantised model."""
    return (
        f"is quantized ({why}): codes and scales cannot be averaged; merge the models that it was"
        " made from, or dequantize it first"
    )


def why_codes(codes: Mapping[str, Described], tensors: Iterable[str]) -> str | None:
    """Why the tensors are codes, by the first one whose name or neighbours show it; None where they
    are none.
    """
    beside: dict[str, list[str]] = {}  # module -> the last parts of its tensors' names
    for name in tensors:
        module, _, last = name.rpartition(".")
        if _SCALES.search(last):
            beside.setdefault(module, []).append(name)
    for name, info in codes.items():
        module = name.rpartition(".")[0]
        # `q_proj.scales` beside `q_proj.qweight`, `q_proj.weight.absmax` beside `q_proj.weight`.
        scales = [each for each in (*beside.get(module, ()), *beside.get(name, ())) if each != name]
        if scales and len(info.shape) > 1:
            return f"{name} is {info.dtype}, beside {scales[0]}"
        # No module has a matrix of small integers for its weight, whatever stands beside it.
        whole = info.dtype in INTEGERS and len(info.shape) > 1 and name.endswith(_WEIGHT)
        if whole or _CODES.search(name):
            return f"{name} is {info.dtype}"
    return None


def why_adapter(tensors: Iterable[str]) -> str | None:
    """The predicate of a sentence about a model that holds factors of adapters, or None."""
    names = [*tensors]
    if _FACTOR.search("\n".join(names)) is None:
        return None
    words: dict[str, set[str]] = {}  # module -> which factors of it there are
    factors: dict[str, None] = {}
    for name in names:
        found = _FACTOR.search(name)
        if found is not None:
            factors[name] = None
            words.setdefault(name[: found.start(1)], set()).add(found[1])
    # With the numbers beside them, as kohya's `alpha`.
    own = sum(name.rpartition(".")[0] + "." in words or name in factors for name in names)
    mostly = 2 * own > len(names)
    if not mostly and all(len(each) == 1 for each in words.values()):
        return None
    what = HOLDS_ADAPTER if mostly else "has LoRA layers beside its weights"
    way = "" if not mostly else "name it with its base in a recipe, as base+adapter, or "
    return (
        f"{what} ({some_names(factors)}): an update is the product of its factors, and merging"
        f" these one by one makes another one; {way}merge the adapter into its model first (peft:"
        " merge_and_unload) and name the result"
    )
