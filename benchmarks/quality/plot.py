"""The table and the plot of docs/quality.md, from the CSV of run.py alone.

python benchmarks/quality/plot.py [quality.csv]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality.csv"
PAGE = ROOT / "docs" / "quality.md"
PLOT = ROOT / "docs" / "images" / "quality.svg"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
TASKS = ("wordnet", "brown", "debian", "spam")

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: list[Row]) -> str:
    lines = [
        f"| method | {' | '.join(TASKS)} | normalised average | settings |",
        f"|---|{'---|' * len(TASKS)}---|---|",
    ]
    for row in rows:
        each = [
            f"{100 * float(row[task]):.1f} ± {100 * float(row[f'{task}_se']):.1f}" for task in TASKS
        ]
        mean = f"{float(row['normalised']):.3f} ± {float(row['normalised_se']):.3f}"
        lines.append(f"| {row['method']} | {' | '.join(each)} | {mean} | {row['settings']} |")
    runs: dict[str, list[str]] = {}
    for row in rows:
        run = (
            f"{row['date']} on {row['machine']}, {row['threads']} threads, torch {row['torch']},"
            f" commit {row['commit']}"
        )
        runs.setdefault(run, []).append(row["method"])
    first, *others = runs
    lines += ["", f"Measured {first}" + (";" if others else ".")]
    lines += [f"{', '.join(runs[run])} {run}." for run in others]
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Normalised averages with standard errors, base and individual models as lines."""
    import matplotlib

    matplotlib.use("svg")

    merged = [row for row in rows if row["method"] not in ("base", "individual")]
    values = [float(row["normalised"]) for row in merged]
    errors = [float(row["normalised_se"]) for row in merged]
    base = next(float(row["normalised"]) for row in rows if row["method"] == "base")
    plt.rcParams["svg.hashsalt"] = "pymerge"
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    positions = range(len(merged))
    axes.barh(positions, values, xerr=errors, color="#4c72b0", error_kw={"lw": 1, "capsize": 3})
    axes.axvline(base, color="#999999", ls=":", lw=1.2, label="base, not fine-tuned")
    axes.axvline(1.0, color="#999999", ls="--", lw=1.2, label="individual models")
    axes.set_yticks(positions, [row["method"] for row in merged])
    axes.invert_yaxis()
    axes.set_xlim(0.45, 1.03)
    axes.set_xlabel("accuracy / accuracy of the individual model, mean over 4 tasks")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def insert(page: Path, text: str) -> None:
    """Put the table between the page's markers."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} lacks the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    rows = read(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
    insert(PAGE, table(rows))
    plot(rows, PLOT)


if __name__ == "__main__":
    main()
