"""peft, mergekit and the official TIES code, each with and without pymerge in its place, in turn.

    python benchmarks/bench_drop_ins.py --official merge_utils.py

Every pair is compared before it is timed. Times are those of one thread, medians of runs that alternate,
so that other programs count little: processor time, and by the clock.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pymerge.compat import mergekit as for_mergekit
from pymerge.compat import peft as for_peft
from pymerge.compat import ties_merging

_EQUAL_MAGNITUDES = 16
_DRAWN = ("dare", "della")
# mergekit's quartiles are those of a random sample where a tensor has more than a million entries.
_SAMPLED = ("arcee_fusion",)
# Those that need norms: summed up in fp32 by mergekit, these leave 5e-6 to 4e-5 of the largest entry
# at a million entries (2e-7 here), so they are compared with mergekit's own results in fp64.
_WITH_NORMS = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")
# method -> parameters, and how many models it takes beside the base; None takes no base.
_WEIGHT = {"weight": 0.5}
_PRUNED = _WEIGHT | {"density": 0.2}
_OF_MERGEKIT: dict[str, tuple[dict[str, float], int | None]] = {
    "linear": (_WEIGHT, None),
    "task_arithmetic": (_WEIGHT, 4),
    "ties": (_PRUNED, 4),
    "breadcrumbs": (_PRUNED, 4),
    "breadcrumbs_ties": (_PRUNED, 4),
    "dare_linear": (_PRUNED, 4),
    "dare_ties": (_PRUNED, 4),
    "della": (_PRUNED | {"epsilon": 0.1}, 4),
    "della_linear": (_PRUNED | {"epsilon": 0.1}, 4),
    "sce": ({"select_topk": 0.2}, 4),
    "ram": ({}, 4),
    "ramplus_tl": ({}, 4),
    "nearswap": ({"t": 0.1}, 1),
    "arcee_fusion": ({}, 1),
    "slerp": ({"t": 0.3}, 1),
    "nuslerp": (_WEIGHT, 2),
    "multislerp": (_WEIGHT, 4),
    "karcher": ({}, None),
    "model_stock": ({}, 4),
}
Run = Callable[[], list[torch.Tensor]]
# What is done without pymerge and with it, the patch that makes the difference, if one does, and what
# gives the expected result, if not the first.
Pair = tuple[str, Run, Run, Callable[[], Any], Run | None]


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_peft(size: int) -> Iterator[Pair]:
    """Four layers of size x size with three adapters of rank 64."""
    import peft

    layers = [torch.nn.Linear(size, size) for _ in range(4)]
    model = torch.nn.Sequential(*layers)
    names = [str(k) for k in range(len(layers))]
    config = peft.LoraConfig(r=min(64, size), target_modules=names, init_lora_weights=False)
    model = peft.get_peft_model(model, config, adapter_name="one")
    for name in ("two", "three"):
        model.add_adapter(name, config)

    def combine(kind: str) -> list[torch.Tensor]:
        options = {} if kind == "linear" else {"density": 0.2}
        model.add_weighted_adapter(
            ["one", "two", "three"], [1.0, 0.5, 0.25], "out", kind, **options
        )
        found = [w.detach().clone() for n, w in model.named_parameters() if ".out." in n]
        model.delete_adapter("out")
        return found

    for kind in ("linear", "magnitude_prune", "ties", "dare_ties"):

        def run(kind: str = kind) -> list[torch.Tensor]:
            return combine(kind)

        yield f"peft, `add_weighted_adapter`, {kind}", run, run, for_peft.patch, None


def of_mergekit(size: int) -> Iterator[Pair]:
    """State dicts of eight matrices of size x size: a base and four models."""
    from mergekit.merge_methods import merge_state_dicts

    states = [{f"w{i}": drawn(size, size, seed=8 * k + i) for i in range(8)} for k in range(5)]
    for method, (parameters, models) in _OF_MERGEKIT.items():
        inputs, base = (states, {}) if models is None else (states[: models + 1], {"base": 0})

        def run(
            method: str = method,
            inputs: Any = inputs,
            parameters: Any = parameters,
            base: Any = base,
        ) -> list[torch.Tensor]:
            with torch.no_grad():
                return [*merge_state_dicts(inputs, method, parameters=parameters, **base).values()]

        def exact(run: Run = run, inputs: Any = inputs) -> list[torch.Tensor]:
            doubles = [{name: w.double() for name, w in state.items()} for state in inputs]
            return [w.float() for w in run(inputs=doubles)]  # type: ignore[call-arg]

        name = f"mergekit, `merge_state_dicts`, {method}"
        yield name, run, run, for_mergekit.patch, exact if method in _WITH_NORMS else None


def of_official(path: Path, size: int) -> Iterator[Pair]:
    """Four task vectors of 8 x size x size elements."""
    tree = ast.parse(path.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    scope: dict[str, Any] = {"torch": torch, "logger": __import__("logging").getLogger("bench")}
    exec(compile(ast.Module(functions, []), str(path), "exec"), scope)
    vectors = torch.stack([drawn(8 * size * size, seed=k) for k in range(4)])
    for mode in (
        ("topk", 20, "mass", "dis-mean"),
        ("topk", 20, "normmass", "dis-mean"),
        ("nf", 0.9, "mass", "dis-sum"),
    ):
        kind, thresh, resolve, merge = mode

        def theirs(k: Any = kind, t: Any = thresh, r: Any = resolve, m: Any = merge) -> Any:
            return [scope["merge_methods"](k, vectors, t, r, m)]

        def ours(k: Any = kind, t: Any = thresh, r: Any = resolve, m: Any = merge) -> Any:
            return [ties_merging.merge_methods(k, vectors, t, r, m)]

        yield (
            f"official TIES code, `merge_methods`, {kind} {resolve} {merge}",
            theirs,
            ours,
            contextlib.nullcontext,
            None,
        )


def check(name: str, theirs: list[torch.Tensor], ours: list[torch.Tensor]) -> None:
    """Equal up to rounding, but for masks that are drawn, and for the few elements whose magnitude
    is the threshold's, of which the others cut some.
    """
    assert len(theirs) == len(ours) > 0, name
    for one, other in zip(theirs, ours, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype, name
        if not any(word in name for word in _DRAWN):
            allowed = 16 * torch.finfo(one.dtype).eps * one.abs().max()
            far = int(((one - other).abs() > allowed).sum())
            sampled = any(word in name for word in _SAMPLED)
            assert far <= (one.numel() // 1000 if sampled else _EQUAL_MAGNITUDES), (name, far)


def measured(pair: Pair, runs: int) -> list[tuple[float, float]]:
    """Milliseconds of each side, of the processor and by the clock: medians of alternating runs."""
    name, theirs, ours, patch, exact = pair
    theirs()
    expected = (exact or theirs)()
    with patch():
        check(name, expected, ours())
    sides = ((theirs, contextlib.nullcontext), (ours, patch))
    taken: list[list[tuple[float, float]]] = [[], []]
    for _ in range(runs):
        for times, (run, context) in zip(taken, sides, strict=True):
            with context():
                clock, processor = time.perf_counter(), time.process_time()
                run()
                times.append((time.process_time() - processor, time.perf_counter() - clock))
    return [
        (1e3 * statistics.median(column[0]), 1e3 * statistics.median(column[1]))
        for column in (tuple(zip(*times, strict=True)) for times in taken)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="rows and columns of a matrix")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose names contain this")
    parser.add_argument("--official", type=Path, help="src/utils/merge_utils.py of TIES-Merging")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pairs = [*of_peft(options.size), *of_mergekit(options.size)]
    if options.official is not None:
        pairs += of_official(options.official, options.size)
    print("| | without, ms | with, ms | times as fast | by the clock, ms | with, ms |")
    print("|---|---|---|---|---|---|")
    for pair in pairs:
        if options.only not in pair[0]:
            continue
        (one, clock), (other, other_clock) = measured(pair, options.runs)
        print(
            f"| {pair[0]} | {one:,.1f} | {other:,.1f} | {one / other:.1f}"
            f" | {clock:,.1f} | {other_clock:,.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
