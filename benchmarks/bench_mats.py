"""Time of `mats`: an iteration beside its matrix products, and whole solves beside the official
formulation.

    python benchmarks/bench_mats.py --statistics DIR      DIR as benchmarks/quality/collect_minilm.py writes it
    python benchmarks/bench_mats.py                       synthetic statistics of similar spectra
    python benchmarks/bench_mats.py --toy                 tiny shapes, to see that it runs

Three tables, each after a correctness gate, all times from this run:

- `iteration`: one preconditioned iteration at K = 8 over 2K plain products of the same shapes (bar
  on a CPU: 1.2);
- `iterations`: per layer, after how many preconditioned iterations the objective of 100 plain ones
  is reached (bar: 15);
- `solve`: a whole preconditioned solve to that objective against the official formulation's 100
  iterations: an operator on flattened numpy vectors under scipy.sparse.linalg.cg, copied to torch
  and back in each product (bar on a CPU: 5 times).

--out NAME writes NAME.json and NAME.csv; with --part 2/6, which takes every sixth layer from the
second on, the rows are added to those that are there. --device cuda runs the same on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg

from pymerge.backends.cg.iteration import conjugate_gradient
from pymerge.backends.registry import vector_updates
from pymerge.bench import describe_machine
from pymerge.ops.mats.api import mats
from pymerge.ops.mats.system import Operator, Preconditioner, build
from pymerge.rules.mats import resolve

TASKS = ("wordnet", "brown", "debian", "spam")
PLAIN_ITERATIONS, BAR_ITERATIONS = 100, 15
SHAPES = [(384, 384), (1536, 384), (384, 1536), (1024, 1024)]


@dataclass
class Layer:
    """weights, a, b: K matrices each."""

    name: str
    weights: list[torch.Tensor]
    a: list[torch.Tensor]
    b: list[torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--statistics", type=Path, help="folder of benchmarks/quality/collect_minilm.py"
    )
    parser.add_argument("--layers", type=int, help="so many layers, evenly chosen (default all)")
    parser.add_argument("--part", default="1/1", help="I/N: every Nth layer from the Ith on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch and of the compiled kernels")
    parser.add_argument("--only", choices=("iteration", "solve"), help="one table instead of all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    shapes = [(24, 16), (16, 48)] if arguments.toy else SHAPES
    if arguments.statistics:
        layers = real_layers(arguments.statistics, device)
        layers = layers[:: max(1, len(layers) // arguments.layers)] if arguments.layers else layers
    else:
        layers = [
            synthetic(*shape, 4, seed, device)
            for seed, shape in enumerate(shapes[: arguments.layers])
        ]
    part, parts = map(int, arguments.part.split("/"))
    layers = layers[part - 1 :: parts]
    tables: dict[str, list[dict[str, Any]]] = {}
    if arguments.only != "solve":
        tables["iteration"] = [
            time_iteration(*shape, 8, arguments.repeats, device) for shape in shapes
        ]
        show("iteration", tables["iteration"])
    if arguments.only != "iteration":
        tables["solve"] = [time_solve(layer, arguments.repeats) for layer in layers]
        show("solve", tables["solve"])
    machine = describe_machine() | {
        "device": name_of(device),
        "statistics": "real" if arguments.statistics else "synthetic",
    }
    print(json.dumps(machine))
    if arguments.out:
        write(arguments.out, tables, machine, parts > 1)


def time_iteration(
    d_out: int, d_in: int, count: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """An iteration (operator, preconditioner, updates), the operator alone, and 2K plain products,
    measured in turn.
    """
    layer = synthetic(d_out, d_in, count, 0, device)
    rule = resolve(count, objective_tolerance=0.0)
    system = build([torch.stack(layer.a)], [torch.stack(layer.b)], rule, torch.float32)
    operator, precondition = (
        Operator(system, d_out, "fp32"),
        Preconditioner(system, rule, rule.damping),
    )
    x = layer.weights[0][None].clone()
    out, inner = torch.empty_like(x), torch.empty(count, d_out, d_in, device=device)
    want = sum(b @ x[0] @ a for a, b in zip(layer.a, layer.b, strict=True)) * system.scale.float()
    gate("operator", operator(x, out)[0], want, 1e-4)
    run = vector_updates(device.type)

    def products() -> None:
        for k in range(count):
            torch.mm(x[0], layer.a[k], out=inner[k])
        for k in range(count):
            torch.mm(layer.b[k], inner[k], out=out[0])

    def iterations(n: int) -> Callable[[], object]:
        return lambda: conjugate_gradient(
            operator, precondition, torch.zeros_like(x), x.clone(), rule, n, updates=run
        )

    few, many = 2, 8
    times = all_rounds(
        {
            "products": products,
            "operator": lambda: operator(x, out),
            "few": iterations(few),
            "many": iterations(many),
        },
        repeats,
        device,
    )
    # The machine's speed drifts: what is compared comes from one round, and the median of the
    # rounds counts.
    rows = list(zip(*times.values(), strict=True))
    each = [(row[3] - row[2]) / (many - few) for row in rows]
    products_ms = statistics.median(times["products"])
    return {
        "d_out": d_out,
        "d_in": d_in,
        "models": count,
        "products_ms": products_ms,
        "operator_ms": statistics.median(times["operator"]),
        "iteration_ms": statistics.median(each),
        "ratio": statistics.median(e / row[0] for e, row in zip(each, rows, strict=True)),
        "gflops": 2e-6 * count * d_out * d_in * (d_out + d_in) / products_ms,
    }


def time_solve(layer: Layer, repeats: int) -> dict[str, Any]:
    """100 plain iterations in the official formulation, and as many preconditioned ones as reach
    their objective.
    """
    ours = mats(layer.weights, layer.a, layer.b, flavor="paper", iterations=10).weight
    gate("10 plain iterations", ours, official_cg(layer, 10)[0], 1e-3)
    begin = time.perf_counter()
    official, plain = official_cg(layer, PLAIN_ITERATIONS)
    synchronise(layer.weights[0].device)
    first = 1e3 * (time.perf_counter() - begin)
    target = objective(layer, official)
    needed = iterations_to(layer, target)
    row: dict[str, Any] = {
        "layer": layer.name,
        "d_out": len(layer.b[0]),
        "d_in": len(layer.a[0]),
        "models": len(layer.weights),
        "plain_iterations": plain,
        "iterations": needed,
        "within_bar": needed is not None and needed <= BAR_ITERATIONS,
    }
    if needed is not None:
        device = layer.weights[0].device
        times = in_turn({"ours": lambda: solved(layer, needed)}, repeats, device)
        if repeats > 1:  # measured once already, after a warm-up of 10 iterations
            again = in_turn({"official": lambda: official_cg(layer, PLAIN_ITERATIONS)}, 1, device)
            first = min(first, again["official"])
        times["official"] = first
        row |= {
            "official_ms": times["official"],
            "ours_ms": times["ours"],
            "speedup": times["official"] / times["ours"],
            "official_iteration_ms": times["official"] / plain,
        }
    return row


def iterations_to(layer: Layer, target: float, most: int = 40) -> int | None:
    """The fewest preconditioned iterations that reach an objective, by bisection: each iteration
    lowers it (M6).
    """
    if objective(layer, solved(layer, most)) > target:
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2 if high <= 2 * BAR_ITERATIONS else BAR_ITERATIONS
        if objective(layer, solved(layer, middle)) <= target:
            high = middle
        else:
            low = middle
    return high


def solved(layer: Layer, iterations: int) -> torch.Tensor:
    return mats(
        layer.weights, layer.a, layer.b, iterations=iterations, objective_tolerance=0.0
    ).weight


def official_cg(layer: Layer, iterations: int) -> tuple[torch.Tensor, int]:
    """The official formulation, from the average; (weight, iterations done)."""
    device = layer.weights[0].device
    transposed = [w.T for w in layer.weights]
    shape = transposed[0].shape
    right = sum(a @ w @ b for a, w, b in zip(layer.a, transposed, layer.b, strict=True))
    done = 0

    def product(flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat).reshape(shape).to(device).float()
        total = None
        for a, b in zip(layer.a, layer.b, strict=True):
            part = torch.matmul(torch.matmul(a, x), b)
            total = part if total is None else total.add_(part)
        return total.flatten().cpu().numpy()

    def count(_: np.ndarray) -> None:
        nonlocal done
        done += 1

    start = (sum(transposed) / len(transposed)).flatten().cpu().numpy()
    size = shape.numel()
    operator = LinearOperator((size, size), matvec=product)
    found, _ = cg(
        operator, right.flatten().cpu().numpy(), x0=start, maxiter=iterations, callback=count
    )
    return torch.from_numpy(found).to(device).float().reshape(shape).T, max(done, 1)


def objective(layer: Layer, x: torch.Tensor) -> float:
    """f of docs/spec/mats.md, M1, in float64."""
    total = 0.0
    for w, a, b in zip(layer.weights, layer.a, layer.b, strict=True):
        e = x.double() - w.double()
        total += float((e * (b.double() @ e @ a.double())).sum()) / 2
    return total


def synthetic(d_out: int, d_in: int, count: int, seed: int, device: torch.device) -> Layer:
    """Spectra as behind real layers: A and B fall over five decades, B has an exact null vector,
    tasks differ in trace.
    """
    # On the device: the larger shapes are 6 Tflop of binary64.
    g = torch.Generator(device).manual_seed(seed)
    like = {"generator": g, "device": device}
    wide = {**like, "dtype": torch.float64}
    base = torch.randn(d_out, d_in, **like) / d_in**0.5
    common = {d: torch.randn(d, d, **wide) for d in {d_out, d_in}}

    def gram(d: int, null: bool) -> torch.Tensor:
        mix = common[d] + 0.5 * torch.randn(d, d, **wide)
        spread = 10 ** (-2.5 * torch.arange(d, dtype=torch.float64, device=device) / d)
        rows = torch.randn(2 * d, d, **wide) * spread @ mix
        if null:
            rows = rows - rows.mean(1, keepdim=True)
        scale = float(10 ** (torch.rand(1, **wide) - 0.5))
        return (scale * rows.T @ rows / len(rows)).float()

    weights = [base + 0.02 * torch.randn(d_out, d_in, **like) for _ in range(count)]
    a = [gram(d_in, False) for _ in range(count)]
    return Layer(f"synthetic {d_out}x{d_in}", weights, a, [gram(d_out, True) for _ in range(count)])


def real_layers(folder: Path, device: torch.device) -> list[Layer]:
    """The encoder's linear layers with the statistics of its four fine-tunes."""
    from safetensors.torch import load_file

    from pymerge.statistics import load

    readers = [load(folder / f"{task}.safetensors") for task in TASKS]
    models = [load_file(folder / "models" / task / "model.safetensors") for task in TASKS]
    found = []
    for name in readers[0].layers:
        a = [reader.input_gram(name) for reader in readers]
        b = [reader.output_grad_gram(name) for reader in readers]
        if any(x is None for x in (*a, *b)):
            continue
        weights = [model[f"{name}.weight"].to(device) for model in models]
        found.append(Layer(name, weights, [x.to(device) for x in a], [x.to(device) for x in b]))
    return found


def in_turn(
    calls: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """The fastest of each in ms: other processes only ever add."""
    return {name: min(held) for name, held in all_rounds(calls, repeats, device).items()}


def all_rounds(
    calls: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """The times of each in ms, measured in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            synchronise(device)
            begin = time.perf_counter()
            call()
            synchronise(device)
            if round_:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gate(what: str, got: torch.Tensor, want: torch.Tensor, level: float) -> None:
    """Nothing is timed that is wrong."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error < level:
        sys.exit(f"{what}: relative error {error:.1e}, allowed {level:.0e}; nothing was timed")


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, *([cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    if title == "solve" and all("ours_ms" in row for row in rows):
        ours, official = (sum(row[key] for row in rows) for key in ("ours_ms", "official_ms"))
        most = max(row["iterations"] for row in rows)
        print(
            f"all layers: {official:.0f} ms official, {ours:.0f} ms ours, {official / ours:.1f}"
            f" times; at most {most} iterations"
        )


def cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def write(
    out: Path, tables: dict[str, list[dict[str, Any]]], machine: dict[str, Any], add: bool
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if add and out.with_suffix(".json").exists():
        earlier = json.loads(out.with_suffix(".json").read_text())
        if earlier["machine"].get("commit") != machine.get("commit"):
            sys.exit(f"{out}.json is of another commit; delete it, or write elsewhere")
        machine = earlier["machine"]
        tables = {
            key: earlier.get(key, []) + tables.get(key, [])
            for key in ("iteration", "solve")
            if key in earlier or key in tables
        }
    out.with_suffix(".json").write_text(json.dumps({"machine": machine, **tables}, indent=1) + "\n")
    rows = [{"table": title, **row} for title, held in tables.items() for row in held]
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
