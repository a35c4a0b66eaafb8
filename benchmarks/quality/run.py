"""How good are merged models? Four real fine-tunes of a real encoder, merged by every method,
measured on their tasks.

    python benchmarks/quality/run.py --work DIR          results to benchmarks/results/quality.csv
    python benchmarks/quality/run.py --work DIR --only WUDI --only Iso-C
                                                         these anew, and the other rows as they are
    python benchmarks/quality/plot.py                    the table and the plot of docs/quality.md, from the CSV alone

Settings of a method are chosen on the validation splits, by accuracy and among equals by
cross-entropy; accuracies are of the test splits. DIR keeps models and statistics, so that a second
run starts from them. --toy measures little and proves only that it runs.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(Path(__file__).parent)]

from collect_minilm import KINDS, collect_task  # noqa: E402
from minilm_tasks import (  # noqa: E402
    TASKS,
    Evaluator,
    load_tasks,
    standard_error,
    write_model_folders,
)
from safetensors.torch import load_file  # noqa: E402

import pymerge  # noqa: E402
from pymerge.engine.state_dict_statistics import merge_with_statistics  # noqa: E402
from pymerge.statistics import Statistics, load  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quality.csv"
PREFIX = "encoder.layer."
RESAMPLES = 2000
TOY = {"train": 32, "val": 20, "test": 40}

StateDict = dict[str, torch.Tensor]
Settings = dict[str, Any]


class Judgement(NamedTuple):
    """Of a model on a split: per text whether it is right (1.0) or not, and the mean cross-entropy
    in nats.
    """

    correct: torch.Tensor
    loss: float


@dataclass
class Bench:
    """Models, statistics and the judge. What is merged is the encoder blocks; the embeddings are
    the base's.
    """

    evaluator: Evaluator
    base: StateDict
    tuned: dict[str, StateDict]
    statistics: list[Statistics]
    best: dict[str, Settings] = field(default_factory=dict)

    def blocks(self, state: StateDict) -> StateDict:
        return {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}

    @property
    def models(self) -> list[StateDict]:
        return [self.blocks(state) for state in self.tuned.values()]

    def judge(self, model: Mapping[str, torch.Tensor], task: str, split: str) -> Judgement:
        self.evaluator.load(model)
        correct, losses = [], []
        with torch.inference_mode():
            for inputs, labels in self.evaluator.batches(task, split):
                logits = self.evaluator.logits(inputs, task)
                correct.append((logits.argmax(-1) == labels).double())
                losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        return Judgement(torch.cat(correct).clone(), float(torch.cat(losses).double().mean()))

    def correct(self, model: Mapping[str, torch.Tensor], split: str) -> dict[str, torch.Tensor]:
        return {task: self.judge(model, task, split).correct for task in TASKS}


def by_name(bench: Bench, method: str, **options: Any) -> StateDict:
    return pymerge.merge(bench.models, bench.blocks(bench.base), method=method, **options)


def by_statistics(bench: Bench, method: str, **options: Any) -> StateDict:
    """With an init of "task_arithmetic": at the scaling that was best for task arithmetic
    itself.
    """
    if options.get("init") == "task_arithmetic":
        options["init_options"] = {"scaling": bench.best["task arithmetic"]["scaling"]}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*moved more than"
        )  # the validation split is the judge here
        merged, _ = merge_with_statistics(
            bench.models, bench.blocks(bench.base), bench.statistics, method, **options
        )
    return merged


@dataclass(frozen=True)
class Method:
    """A way to merge and the settings that the validation splits choose from."""

    name: str
    merge: Callable[..., StateDict]
    fixed: Settings
    grid: dict[str, tuple[Any, ...]]

    def settings(self) -> Iterator[Settings]:
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


STARTS = ("average", "task_arithmetic")
METHODS = (
    Method("average", by_name, {"method": "task_arithmetic", "scaling": 1 / len(TASKS)}, {}),
    Method(
        "task arithmetic",
        by_name,
        {"method": "task_arithmetic"},
        {"scaling": (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)},
    ),
    Method(
        "TIES",
        by_name,
        {"method": "ties"},
        {"density": (0.2, 0.5), "scaling": (0.7, 1.0, 1.3, 1.6)},
    ),
    Method(
        "DARE",
        by_name,
        {"method": "dare_linear", "density": 0.5, "normalize": False, "seed": 0},
        {"scaling": (0.3, 0.4, 0.5, 0.6, 0.8)},
    ),
    Method("WUDI", by_name, {"method": "wudi"}, {"damping": (0.1, 1.0)}),
    Method("TSV-Merge", by_name, {"method": "tsv"}, {"scaling": (0.7, 1.0, 1.4)}),
    Method("Iso-C", by_name, {"method": "iso_c"}, {"scaling": (0.7, 1.0, 1.4)}),
    Method("Fisher", by_statistics, {"method": "fisher"}, {"init": STARTS}),
    Method(
        "RegMean",
        by_statistics,
        {"method": "regmean"},
        {"off_diagonal": (0.5, 0.9, 1.0), "init": STARTS},
    ),
    Method(
        "MaTS, plain 10",
        by_statistics,
        {"method": "mats", "preconditioner": False, "iterations": 10},
        {"init": STARTS},
    ),
    Method(
        "MaTS, plain 100",
        by_statistics,
        {"method": "mats", "preconditioner": False, "iterations": 100},
        {"init": STARTS[1:]},  # the paper's start alone: this is the slow one
    ),
    Method(
        "MaTS, preconditioned 5",
        by_statistics,
        {"method": "mats", "iterations": 5},
        {"damping": (0.03, 0.1), "init": STARTS},
    ),
)


@dataclass
class Row:
    """A line of the result: accuracies by task, and the mean over tasks of accuracy / individual
    accuracy.
    """

    method: str
    settings: str
    accuracies: dict[str, float]
    normalised: float
    normalised_se: float
    validation: float
    merge_seconds: float


def prepare(
    work: Path, sizes: Mapping[str, int] | None = None, kinds: tuple[str, ...] = KINDS
) -> Bench:
    """Models and statistics in `work`, made where they are not there yet. sizes: texts of a split,
    where not all.
    """
    folders = write_model_folders(work / "models")
    tasks = load_tasks()
    for task in tasks.values():
        for split, size in (sizes or {}).items():
            # Every so many texts, since a split may be in order of its classes.
            task.splits[split] = task.splits[split][:: max(1, len(task.splits[split]) // size)][
                :size
            ]
    evaluator = Evaluator(folders["base"], tasks)
    statistics = []
    for task in TASKS if kinds else ():
        path = work / (f"{task}-{sizes['train']}.safetensors" if sizes else f"{task}.safetensors")
        if not path.exists():
            start = time.perf_counter()
            collect_task(evaluator, folders[task], task, path, kinds=kinds)
            print(f"statistics of {task}: {time.perf_counter() - start:.1f} s", flush=True)
        statistics.append(load(path))
    states = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    return Bench(evaluator, states["base"], {task: states[task] for task in TASKS}, statistics)


def measure(bench: Bench, methods: tuple[Method, ...] = METHODS) -> list[Row]:
    """All rows: base, individual models, then each method at its best settings."""
    alone = {
        split: {t: bench.judge(bench.tuned[t], t, split).correct for t in TASKS}
        for split in ("val", "test")
    }
    rows = [
        _row(
            "base",
            {},
            bench.correct(bench.base, "test"),
            alone["test"],
            0,
            0,
        ),
        _row("individual", {}, alone["test"], alone["test"], 0, 0),
    ]
    for method in methods:
        candidates = []
        for settings in method.settings():
            merged, seconds = _merged(bench, method, settings)
            judged = {t: bench.judge(merged, t, "val") for t in TASKS}
            score = _normalised({t: judged[t].correct for t in TASKS}, alone["val"])
            loss = sum(judged[t].loss for t in TASKS) / len(TASKS)
            candidates.append((score, loss, settings, merged, seconds))
            print(
                f"  {method.name} {_text(settings)}: validation {score:.4f}, loss {loss:.4f},"
                f" merged in {seconds:.1f} s",
                flush=True,
            )
        # Some hundred texts tell good settings apart to a few tenths of a percent: among equals the
        # loss decides.
        validation, _, settings, merged, seconds = max(candidates, key=lambda c: (c[0], -c[1]))
        bench.best[method.name] = settings
        found = bench.correct(merged, "test")
        rows.append(_row(method.name, settings, found, alone["test"], validation, seconds))
        print(_line(rows[-1]), flush=True)
    return rows


def _merged(bench: Bench, method: Method, settings: Settings) -> tuple[StateDict, float]:
    start = time.perf_counter()
    blocks = method.merge(bench, **method.fixed, **settings)
    seconds = time.perf_counter() - start
    return {**bench.base, **blocks}, seconds


def _normalised(found: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> float:
    return sum(float(found[t].mean() / alone[t].mean()) for t in TASKS) / len(TASKS)


def _row(
    name: str,
    settings: Settings,
    found: dict[str, torch.Tensor],
    alone: dict[str, torch.Tensor],
    validation: float,
    seconds: float,
) -> Row:
    """The standard error of the normalised average by resampling texts, the same for merged and
    individual models.
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(RESAMPLES, dtype=torch.float64)
    for task in TASKS:
        size = len(found[task])
        chosen = torch.randint(size, (RESAMPLES, size), generator=generator)
        total += found[task][chosen].mean(1) / alone[task][chosen].mean(1)
    return Row(
        method=name,
        settings=_text(settings),
        accuracies={task: float(found[task].mean()) for task in TASKS},
        normalised=_normalised(found, alone),
        normalised_se=float((total / len(TASKS)).std()),
        validation=validation,
        merge_seconds=seconds,
    )


def _text(settings: Settings) -> str:
    return ", ".join(f"{name} {value}".replace("_", " ") for name, value in settings.items())


def _line(row: Row) -> str:
    each = "  ".join(f"{task} {100 * row.accuracies[task]:.1f}" for task in TASKS)
    return (
        f"{row.method:24} {row.normalised:.3f} ± {row.normalised_se:.3f}  {each}  ({row.settings})"
    )


def write_csv(rows: list[Row], path: Path, test_size: int, keep: bool = False) -> None:
    """One line a method, with the machine, the commit and the date. keep: leave the lines of other
    methods, and those of base and individual models, as they are in the file.
    """
    order = ["base", "individual", *(method.name for method in METHODS)]
    lines: dict[str, list[str]] = {}
    if keep and path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            lines = {line[0]: line for line in list(csv.reader(file))[1:]}
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = [column for task in TASKS for column in (task, f"{task}_se")]
        writer.writerow(
            ["method", "settings", *columns, "normalised", "normalised_se", "validation", "merge_seconds",
             "threads", "machine", "torch", "commit", "date"]
        )  # fmt: skip
        for row in rows:
            each = [
                f"{value:.4f}"
                for accuracy in row.accuracies.values()
                for value in (accuracy, standard_error(accuracy, test_size))
            ]
            if row.method in lines and row.method in ("base", "individual"):
                continue
            lines[row.method] = [
                row.method, row.settings, *each, f"{row.normalised:.4f}", f"{row.normalised_se:.4f}",
                f"{row.validation:.4f}", f"{row.merge_seconds:.2f}", str(torch.get_num_threads()),
                platform.machine(), torch.__version__, commit, datetime.now(timezone.utc).date().isoformat(),
            ]  # fmt: skip
        writer.writerows(lines[name] for name in order if name in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="keeps models and statistics")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file")
    names = [method.name for method in METHODS]
    parser.add_argument("--only", action="append", choices=names, help="measure this one alone")
    parser.add_argument("--toy", action="store_true", help="few texts: does it run?")
    arguments = parser.parse_args()
    start = time.perf_counter()
    chosen = set(arguments.only or names)
    solved = any(m.name in chosen and m.merge is by_statistics for m in METHODS)
    if solved:
        chosen.add("task arithmetic")  # at whose best scaling they may start
    methods = tuple(m for m in METHODS if m.name in chosen)
    kinds = KINDS if solved else ()
    bench = prepare(arguments.work, TOY if arguments.toy else None, kinds)
    rows = measure(bench, methods)
    test_size = len(bench.evaluator.tasks[TASKS[0]].splits["test"])
    write_csv(rows, arguments.out, test_size, keep=bool(arguments.only))
    print()
    for row in rows:
        print(_line(row))
    print(
        f"{time.perf_counter() - start:.0f} s, {time.process_time():.0f} s of CPU time, written to"
        f" {arguments.out}"
    )


if __name__ == "__main__":
    main()
