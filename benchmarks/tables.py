"""The tables of docs/benchmarks.md, from the files in benchmarks/results; `python
benchmarks/charts.py` writes them between the page's markers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"

Rows = list[dict[str, str]]
KNOWN, WHOLE = "thresholds known", "ties"
GRAM = ("gram", "combine", "gram + combine")


def rows(name: str, of: str = "rows") -> Rows:
    """What `pymerge bench --out` wrote, as text, each row with what is said of the machine."""
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return [{key: str(x) for key, x in (found["machine"] | row).items()} for row in found[of]]


def distinct(found: Rows, column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in found))


def elements(n: str) -> str:
    return f"{int(n) >> 20}M"


def pick(found: Rows, **wanted: str) -> dict[str, str] | None:
    return next((r for r in found if all(r[key] == w for key, w in wanted.items())), None)


def share(row: dict[str, str] | None) -> str:
    return "" if row is None else f"{float(row['percent_of_copy']):.0f} %"


def time_and_share(row: dict[str, str] | None) -> str:
    return "" if row is None else f"{float(row['ms_p50']):.1f} ms, {share(row)}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(found: Rows) -> str:
    """Where and when, and what the copy did meanwhile."""
    first = found[0]
    rates = sorted(float(row["copy_gb_per_s"]) for row in found)
    return (
        f"{first['threads']} threads, {first['cpu_level']}, commit {first['commit']},"
        f" {first['date']}; the copy beside the rows ran at {rates[0]:.0f} to {rates[-1]:.0f} GB/s,"
        f" half of the time above {rates[len(rates) // 2]:.0f}."
    )


def by_size(name: str, cell: Callable[[dict[str, str] | None], str]) -> str:
    """A line for each kind of tensors and number of models, two columns for each size."""
    found = rows(name)
    sizes = distinct(found, "n")
    head = ["tensors", "K"]
    for n in sizes:
        head += [f"known, {elements(n)}", f"whole, {elements(n)}"]
    body = []
    for family in distinct(found, "family"):
        for count in distinct(found, "models"):
            line = [family, count]
            for n in sizes:
                for op in (KNOWN, WHOLE):
                    row = pick(found, family=family, models=count, n=n, op=op)
                    line.append(cell(row))
            body.append(line)
    return f"{about(found)}\n\n{table(head, body)}"


def merges() -> str:
    found = [row for row in rows("cpu_kernels_merges.json") if row["op"] not in GRAM]
    families = distinct(found, "family")
    head = ["merge"]
    for family in families:
        head += [f"{family}: known", "whole"]
    body = []
    for merge in distinct(found, "merge"):
        line = [merge]
        for family in families:
            for op in (KNOWN, WHOLE):
                line.append(time_and_share(pick(found, merge=merge, family=family, op=op)))
        body.append(line)
    return f"{about(found)}\n\n{table(head, body)}"


def gram() -> str:
    found = [row for row in rows("cpu_kernels_merges.json") if row["op"] in GRAM]
    body = [
        [merge, family]
        + [time_and_share(pick(found, merge=merge, family=family, op=op)) for op in GRAM]
        for merge in distinct(found, "merge")
        for family in distinct(found, "family")
    ]
    return f"{about(found)}\n\n{table(['', 'tensors', *GRAM], body)}"


def peers() -> str:
    found = rows("cpu_peers_merges.json", "peers")
    body = [
        [
            row["merge"], row["family"], row["models"], row["peer"], f"{float(row['ms_p50']):,.0f}",
            f"{float(row['pymerge_ms_p50']):.1f}", f"{float(row['ratio']):,.1f}",
        ]
        for row in found
    ]  # fmt: skip
    head = ["merge", "tensors", "K", "beside", "ms", "pymerge, ms", "times as fast"]
    first = found[0]
    place = f"{first['threads']} threads, {first['cpu_level']}, commit {first['commit']}"
    return f"{place}, {first['date']}.\n\n{table(head, body)}"


TABLES: dict[str, Callable[[], str]] = {
    "kernels": lambda: by_size("cpu_kernels.json", time_and_share),
    "small": lambda: by_size("cpu_kernels_small.json", share),
    "merges": merges,
    "models": lambda: by_size("cpu_kernels_models.json", time_and_share),
    "gram": gram,
    "peers": peers,
}


def page(text: str) -> str:
    """The page's text with its tables between their markers."""
    for name, made in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        text, changed = re.subn(
            f"{re.escape(begin)}.*?{re.escape(end)}",
            lambda _, b=begin, m=made, e=end: f"{b}\n\n{m()}\n\n{e}",
            text,
            flags=re.DOTALL,
        )
        if changed != 1:
            raise SystemExit(f"{PAGE.name} has not the markers {begin} and {end} once")
    return text
