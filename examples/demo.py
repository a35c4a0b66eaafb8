"""`make demo`: merge four real fine-tunes of a real encoder with the `pymerge` command, and measure
what came out.

It writes the base model and its four fine-tunes out as ordinary model folders, runs `pymerge merge`
on `examples/linear.yml` and `examples/ties.yml`, loads the results with transformers, and prints
the test accuracy of every model on every task. Everything lands in `demo-output`, at the root of
the repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("demo-output")
RECIPES = {"averaged": "examples/linear.yml", "TIES": "examples/ties.yml"}


@dataclass(frozen=True)
class Row:
    """One line of the table: a model's accuracy per task; `individual` is each task's own
    fine-tune.
    """

    label: str
    accuracies: Mapping[str, float]


def normalised(row: Row, individual: Row) -> float:
    """The average over tasks of a model's accuracy as a share of that task's own fine-tune's."""
    shares = [row.accuracies[task] / individual.accuracies[task] for task in individual.accuracies]
    return sum(shares) / len(shares)


def build_table(rows: Sequence[Row], individual: Row, counts: Mapping[str, int]) -> Table:
    """Accuracies in percent with their standard errors, the best single model of each column in
    bold.
    """
    from minilm_tasks import standard_error

    table = Table(
        title="Test accuracy, % ± standard error",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    for task in counts:
        table.add_column(task, justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    best = {
        task: max(row.accuracies[task] for row in rows if row is not individual) for task in counts
    }
    for row in rows:
        cells = []
        for task, count in counts.items():
            accuracy = row.accuracies[task]
            cell = f"{100 * accuracy:.1f} ±{100 * standard_error(accuracy, count):.1f}"
            bold = row is not individual and accuracy == best[task]
            cells.append(f"[bold]{cell}[/bold]" if bold else cell)
        table.add_row(row.label, *cells, f"{100 * normalised(row, individual):.1f} %")
        if row is individual:
            table.add_section()
    return table


def run_merge(recipe: str, out: str) -> None:
    """Run the `pymerge merge` command as a user would, in this folder; its output goes where ours
    goes.
    """
    command = [sys.executable, "-m", "pymerge", "merge", recipe, out, "--overwrite"]
    subprocess.run(command, check=True)


def main() -> int:
    """Run the demo; returns the exit status."""
    os.chdir(ROOT)  # the recipes name folders from here
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    console = Console()
    started = time.perf_counter()

    console.rule("[bold]1. Four fine-tunes of one encoder", align="left")
    with console.status("loading torch and transformers"):
        from minilm_tasks import TASKS, Evaluator, write_model_folders

        folders = write_model_folders(OUT / "models")
    for name, folder in folders.items():
        size = (folder / "model.safetensors").stat().st_size
        console.print(f"  {folder}  [dim]{size / 1e6:.0f} MB, {_note(name)}[/dim]")

    console.rule("[bold]2. One model out of four", align="left")
    merged = {}
    for label, recipe in RECIPES.items():
        merged[label] = OUT / Path(recipe).stem
        console.print(
            f"[bold]$ pymerge merge {recipe} {merged[label]} --overwrite[/bold]", highlight=False
        )
        run_merge(recipe, str(merged[label]))
    console.print(
        "[dim]TIES kept more than its density of 30 %: the embeddings were not fine-tuned;\n"
        "where a whole task vector is zero, every entry is as large as the threshold.[/dim]",
        soft_wrap=True,
    )

    console.rule("[bold]3. What the merged models can do", align="left")
    with console.status("measuring") as status:
        evaluator = Evaluator(folders["base"])

        def measure(label: str, model: Path) -> Row:
            status.update(f"measuring: {label}")
            return Row(label, evaluator.accuracies(model))

        base = measure("base", folders["base"])
        status.update("measuring: the four fine-tunes, each on its own task")
        individual = Row(
            "individual, 4 models", {t: evaluator.accuracy(folders[t], t) for t in TASKS}
        )
        rows = [base, individual]
        rows += [measure(f"{label}, 1 model", folder) for label, folder in merged.items()]
    counts = {task: len(evaluator.tasks[task].splits["test"]) for task in TASKS}
    console.print(build_table(rows, individual, counts))
    console.print(
        "[dim]individual: every task with its own fine-tune. share: of the individual\nmodels'"
        f" accuracy, averaged. {min(counts.values())} test texts a task; the head is frozen.[/dim]",
        soft_wrap=True,
    )
    console.print(
        f"\nThe merged model is an ordinary folder: [bold]{merged['TIES']}[/bold]"
        f"  [dim]({time.perf_counter() - started:.0f} s in all)[/dim]"
    )
    return 0


def _note(name: str) -> str:
    return "all-MiniLM-L6-v2 as published" if name == "base" else f"fine-tuned on {name}"


if __name__ == "__main__":
    sys.exit(main())
