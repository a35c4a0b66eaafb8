"""What is passed as an option is never read from freed memory, not even for the message, and no
class of the caller's decides which error comes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from tensor_cases import Model, Wrapped, eye, good, reader
from torch._subclasses.fake_tensor import FakeTensorMode

import pymerge
from pymerge.compat import mergekit, peft, ties_merging
from pymerge.engine.state_dicts import MergeKeywords
from pymerge.messages.words import shown
from pymerge.rules import mats as mats_rules
from pymerge.statistics import collect


def freed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


class Hostile:
    """Raises whatever it is asked."""

    __hash__ = None  # type: ignore[assignment]

    def fail(self, *_: object) -> Any:
        raise RuntimeError("asked")

    __repr__ = __float__ = __index__ = __iter__ = __bool__ = __eq__ = fail  # type: ignore[assignment]


def nested() -> list[Any]:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    return value


ONE, TWO, WHOLE = torch.ones(()), torch.ones(2), torch.tensor([1])
VALUES: dict[str, Callable[[], Any]] = {
    "freed": lambda: freed(ONE),
    "freed in one dimension": lambda: freed(torch.ones(1)),
    "freed integer": lambda: freed(WHOLE),
    "freed values": lambda: freed(TWO),
    "meta": lambda: ONE.to("meta"),
    "fake": lambda: FakeTensorMode().from_tensor(TWO),
    "wrapped": lambda: Wrapped(TWO),
    "a list of freed": lambda: [freed(ONE)] * 2,
    "a mapping of freed": lambda: {"w": freed(ONE)},
    "hostile": Hostile,
    "nested": nested,
    "a long number": lambda: 10**5000,
    "a long text": lambda: "x" * 100_000,
    "a surrogate": lambda: "\ud800",
    "complex": lambda: 1j,
}
OWN_WORDS = ("name", "rename", "batch_options", "model_name")  # take any text, or have no effect


_OF_A_BASE = ("nuslerp", "multislerp", "model_stock", "ram", "ramplus_tl", "sce")


def _calls() -> Iterator[tuple[str, Callable[[Any], object], str]]:
    two, start = [good()] * 2, good()
    called: list[tuple[str, Callable[..., Any]]] = [
        ("ties", partial(pymerge.ties, two, start)),
        ("ties by name", partial(pymerge.ties, [{"w": good()}] * 2, {"w": start})),
        ("select", partial(pymerge.select, two, start)),
        ("gram", partial(pymerge.gram, two)),
        ("combine", partial(pymerge.combine, two, [1, 1])),
        ("regmean", partial(pymerge.regmean, two, [eye()] * 2)),
        ("weighted_average", partial(pymerge.weighted_average, two, two)),
        ("mats", partial(pymerge.mats, two, [eye()] * 2)),
        ("slerp", partial(pymerge.slerp, two, t=0.5)),
        ("nearswap", partial(pymerge.nearswap, two[:1], start, t=0.5)),
        ("arcee_fusion", partial(pymerge.arcee_fusion, two[:1], start)),
        ("karcher", partial(pymerge.karcher, two)),
        *(
            (name, partial(getattr(pymerge, name), two, start))
            for name in (*_OF_A_BASE, "wudi", "tsv", "iso_c")
        ),
        (
            "merge_with_statistics",
            partial(
                pymerge.merge_with_statistics, [{"w": good()}] * 2, None, [reader(eye())] * 2
            ),
        ),
        ("collect", partial(collect, Model(), [torch.ones(2, 4)], kinds=("input_gram",))),
        ("prune", partial(peft.prune, good(), density=0.5, method="random")),
        ("peft ties", partial(peft.ties, two, weights=torch.ones(2), density=0.5)),
        ("sparsify", partial(mergekit.sparsify, good(), density=0.5, method="magnitude")),
        (
            "mergekit",
            partial(
                mergekit.merge_state_dicts, [{"w": good()}] * 2, method="linear",
                parameters={"weight": 1},
            ),
        ),
        ("official", partial(ties_merging.ties_merging, good(), merge_func="dis-mean")),
        (
            "official modes",
            partial(ties_merging.merge_methods, "topk", good(), 0.5, merge_func="dis-mean",
                    resolve_method="mass"),
        ),
        ("aggregate", partial(ties_merging.aggregate, good(), agg_type="sum", final_signs=None)),
    ]  # fmt: skip
    for name, function in called:
        names = [*inspect.signature(function).parameters]
        if name == "mats":
            names = [each for each in names if each != "options"] + [*mats_rules.OPTIONS]
        for option in names:
            if option in ("models", "base", "out", "statistics", "reset_thresh"):
                continue
            if option not in (*OWN_WORDS, "options"):
                yield name, lambda v, f=function, o=option: f(**{o: v}), option
    for method in ("ties", "linear", "della", "passthrough", "multislerp", "sce", "mats"):
        base = None if method in ("linear", "passthrough") else {"w": start}
        models = [{"w": good()}] * (1 if method == "passthrough" else 2)
        more = {"statistics": [reader(eye())] * 2} if method == "mats" else {}
        merge = partial(pymerge.merge, models, base, method=method, **more)
        for option in MergeKeywords.__annotations__:
            if option != "out":
                yield f"merge {method}", lambda v, f=merge, o=option: f(**{o: v}), option


CASES = list(_calls())


@pytest.mark.parametrize("kind", VALUES)
def test_options_of_every_function(kind: str) -> None:
    """A TypeError or ValueError in words for each; a number that is none is no crash."""
    wrong, value = [], VALUES[kind]()
    for name, call, option in CASES:
        try:
            call(value)
        except (TypeError, ValueError, FileNotFoundError) as error:
            text = str(error)
            if option not in text and "has no" not in text:
                wrong.append(f"{name}({option}): {text[:200]}")
            if len(text) > 1500:
                wrong.append(f"{name}({option}): {len(text)} characters")
        except Exception as error:
            wrong.append(f"{name}({option}): {error!r}"[:300])
        else:
            if option != "reports" and ("freed" in kind or kind == "hostile"):
                wrong.append(f"{name}({option}) passes")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("make", [lambda: torch.tensor(0.5), lambda: freed(ONE)])
def test_shown_reads_nothing_of_tensors(make: Callable[[], torch.Tensor]) -> None:
    assert shown([make()]) == "[tensor(...)]"
    assert shown({"a": (make(), 1)}) == "{'a': (tensor(...), 1)}"


def test_shown_is_short() -> None:
    assert shown(0.1) == "0.1" and shown("a'b") == '"a\'b"' and shown([1, None]) == "[1, None]"
    assert len(shown("x" * 10**6)) < 500 and len(shown([*range(10**6)])) < 500
    assert len(shown(nested())) < 500
    assert "bits" in shown(10**5000) and shown(-(10**50)) == str(-(10**50))
    assert "Hostile" in shown(Hostile())


@pytest.mark.parametrize("number", [torch.tensor(0.25), torch.tensor([0.25]).numpy()[0]])
def test_numbers_of_any_kind(number: Any) -> None:
    """SupportsFloat, as the signatures say."""
    models = [torch.randn(4, 4), torch.randn(4, 4)]
    assert torch.equal(pymerge.slerp(models, t=number), pymerge.slerp(models, t=0.25))
    ours = pymerge.nearswap(models[:1], models[1], t=number)
    assert torch.equal(ours, pymerge.nearswap(models[:1], models[1], t=0.25))


@pytest.mark.parametrize("by_name", [False, True])
def test_slerp_names_its_base_and_its_model(by_name: bool) -> None:
    """Inside, the base is the first of two models."""
    x, meta = torch.ones(3), torch.ones(3, device="meta")

    def as_given(tensor: torch.Tensor) -> Any:
        return {"w": tensor} if by_name else tensor

    end = r"\['w'\]" if by_name else ""
    with pytest.raises(TypeError, match=rf"models\[0\]{end} is on the meta"):
        pymerge.slerp([as_given(meta)], as_given(x), t=0.5)
    with pytest.raises(TypeError, match=rf"base{end} is on the meta"):
        pymerge.slerp([as_given(x)], as_given(meta), t=0.5)
    with pytest.raises(TypeError, match=rf"models\[1\]{end} is on the meta"):
        pymerge.slerp([as_given(x), as_given(meta)], t=0.5)


def test_a_minimum_beyond_the_working_type() -> None:
    x = torch.ones(2)
    with pytest.raises(ValueError, match=r"minimum=1e\+200 is above 3\.40282e\+38"):
        pymerge.weighted_average([x, x], [x, x], minimum=1e200)
    assert torch.equal(
        pymerge.weighted_average([x.double()] * 2, [x] * 2, minimum=1e200), x.double()
    )
