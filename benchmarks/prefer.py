"""Have `backend="auto"` take the GPU backend that the committed measurements show to be faster, per device.

    python benchmarks/prefer.py

Reads every table that `make gpu-check` wrote (speed.csv, under whatever name) in benchmarks/results and its folders, of each device the
newest one, and writes pymerge/backends/measured.py. What counts is the geometric mean of CUDA's time over Triton's in the rows that both have: merges
as they are called from Python for "ties", the vector updates of conjugate gradient for "cg". A device without such rows is not entered.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, MODULE = ROOT / "benchmarks/results", ROOT / "pymerge/backends/measured.py"
BACKENDS = ("cuda", "triton")
Faster = dict[str, dict[str, str]]


def main() -> None:
    MODULE.write_text(module(faster(RESULTS)))


def faster(results: Path) -> Faster:
    """Device -> kind of op -> the faster backend."""
    newest: dict[str, list[dict[str, str]]] = {}
    for path in sorted(results.rglob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"what", "backend", "ms_p50", "device", "date"} <= rows[0].keys():
            continue
        device = rows[0]["device"]
        if device not in newest or newest[device][0]["date"] < rows[0]["date"]:
            newest[device] = rows
    found = {
        device: {kind: name for kind in ("ties", "cg") if (name := _of(kind, rows)) is not None}
        for device, rows in sorted(newest.items())
    }
    return {device: kinds for device, kinds in found.items() if kinds}


def _of(kind: str, rows: list[dict[str, str]]) -> str | None:
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if kind_of(row["what"]) == kind and row["backend"] in BACKENDS and row["ms_p50"]:
            times.setdefault(row["what"], {})[row["backend"]] = float(row["ms_p50"])
    ratios = [math.log(t["cuda"] / t["triton"]) for t in times.values() if len(t) == len(BACKENDS)]
    if not ratios:
        return None
    return BACKENDS[0] if sum(ratios) <= 0 else BACKENDS[1]


def kind_of(what: str) -> str | None:
    """Which preference a row of speed.csv speaks for."""
    if what.startswith("cg updates "):
        return "cg"
    return "ties" if what.endswith(" as called") else None


def module(found: Faster) -> str:
    """The text of pymerge/backends/measured.py."""
    head = MODULE.read_text().partition("FASTER")[0] + "FASTER: dict[str, dict[str, str]] = {"
    lines = []
    for device, kinds in found.items():
        pairs = ", ".join(f'"{kind}": "{name}"' for kind, name in kinds.items())
        lines.append(f'    "{device}": {{{pairs}}},\n')
    return head + "".join(["\n", *lines] if lines else []) + "}\n"


if __name__ == "__main__":
    main()
