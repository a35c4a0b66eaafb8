"""The charts of the documentation and the README's speeds, from committed results alone.

python benchmarks/charts.py

It writes docs/images/speed.svg, drop_ins.svg and kernels.svg, and the lines between the markers in
README.md, from cpu_merges.json, cpu_peers.json and cpu_kernels.csv in benchmarks/results and from
the table of docs/coming_from.md, and the tables of docs/benchmarks.md (tables.py). A test compares what is committed with what this would write.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any

import tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
README = ROOT / "README.md"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"

WIDTH, LEFT, RIGHT, STEP = 760, 270, 160, 26

# On a page of the site, docs/assets/site.css sets the same names by the page's own scheme.
STYLE = (
    "svg.scheme{--ink:#1f2328;--faint:#59636e;--own:#4051b5;--other:#b8c0cc;--band:#4051b526;"
    "font-family:system-ui,sans-serif;font-size:14px}"
    "@media(prefers-color-scheme:dark){svg.scheme{--ink:#e6edf3;--faint:#9da7b3;--own:#9fa8ff;"
    "--other:#5b6472;--band:#9fa8ff33}}"
    "svg.scheme text{fill:var(--ink)}svg.scheme .faint{fill:var(--faint);font-size:12px}"
    "svg.scheme .title{font-weight:600}svg.scheme .own{fill:var(--own)}"
    "svg.scheme .other{fill:var(--other)}svg.scheme .line{stroke:var(--faint);fill:none}"
)


@dataclass(frozen=True)
class Bar:
    """A line of a chart: its length in the chart's unit, and what stands behind it."""

    name: str
    value: float
    said: str
    own: bool = False


@dataclass(frozen=True)
class Panel:
    """Bars with one axis. mark: a value at which a line is drawn; log: lengths are logarithms."""

    title: str
    bars: Sequence[Bar]
    mark: float | None = None
    log: bool = False


def rounded(value: float) -> str:
    """Two significant digits: 53.3 is 53, 568 is 570, 6.61 is 6.6."""
    number = float(f"{value:.2g}")
    return f"{number:,.{max(1 - math.floor(math.log10(number)), 0)}f}"


def seconds(value: float) -> str:
    return f"{rounded(value)} s" if value >= 1 else f"{rounded(1000 * value)} ms"


def as_long(value: float, ratio: float) -> str:
    return f"{seconds(value)}, {rounded(ratio)} × as long"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def merges() -> list[tuple[str, float, float, float]]:
    """Whole processes, means of the runs: (method, seconds of pymerge, of mergekit, ratio)."""
    return [
        (row["method"], mean(row["pymerge_s"]), mean(row["mergekit_s"]), row["ratio"])
        for row in read("cpu_merges.json")["rows"]
    ]


def peers() -> list[tuple[str, float, float, float]]:
    """One tensor by TIES, medians in one run: (who, seconds of pymerge, theirs, ratio)."""
    return [
        (row["peer"], row["pymerge_ms_p50"] / 1000, row["ms_p50"] / 1000, row["ratio"])
        for row in read("cpu_peers.json")["peers"]
        if (row["merge"], row["family"], row["models"]) == ("ties", "fp32", 4)
    ]


def drop_ins() -> list[tuple[str, str]]:
    """The table of docs/coming_from.md: (what, times as fast, as it stands there)."""
    page = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    _, _, section = page.partition("\n## How much faster\n")
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [(row[0], row[3]) for row in rows[1:]]


def kernels() -> list[tuple[str, str, int, float]]:
    """(op, family, models, percent of the copy's speed) on the largest tensors."""
    with (RESULTS / "cpu_kernels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    largest = max(int(row["n"]) for row in rows)
    return [
        (row["op"], row["family"], int(row["models"]), float(row["percent_of_copy"]))
        for row in rows
        if int(row["n"]) == largest
    ]


def where(name: str) -> str:
    machine = read(name)["machine"]
    return (
        f"{machine['cores']} cores, {machine['cpu_level'].upper().replace('AVX', 'AVX-')},"
        f" torch {machine['torch'].partition('+')[0]}, {machine['date'][:10]}"
    )


def speed_chart() -> str:
    panels = []
    for method, own, other, ratio in merges():
        bars = (
            Bar("pymerge merge", own, seconds(own), own=True),
            Bar("mergekit-yaml", other, as_long(other, ratio)),
        )
        panels.append(Panel(f"Merging folders, {method}: 494M parameters, two models", bars))
    own = median(each[1] for each in peers())
    bars = (
        Bar("pymerge.ties", own, seconds(own), own=True),
        *(Bar(who, time, as_long(time, ratio)) for who, _, time, ratio in peers()),
    )
    panels.append(Panel("One tensor, ties: 16M elements, four models", bars))
    return draw(panels, f"Less is better. {where('cpu_merges.json')}.")


def drop_in_chart() -> str:
    bars = [Bar(_short(name), float(said), f"{said} ×", own=True) for name, said in drop_ins()]
    panel = Panel("Times as fast with the drop-ins, one thread", bars, mark=1, log=True)
    return draw([panel], "Logarithmic; the line is 1, as fast as without.")


def kernel_chart() -> str:
    panels = []
    for family in dict.fromkeys(row[1] for row in kernels()):
        bars = [
            Bar(f"{op}, {count} models", share, f"{share:.0f} %", own=op == "ties")
            for op, kind, count, share in kernels()
            if kind == family
        ]
        panels.append(Panel(f"{family}, 64M elements", bars, mark=100))
    note = f"Percent of a copy of the same bytes; the line is 100. {where('cpu_kernels.json')}."
    return draw(panels, note)


def _short(name: str) -> str:
    """Without the function that is the same for all rows of a tool."""
    tool, _, what = name.split(", ", 2)
    return f"{tool.removeprefix('official ')}: {what}"


def draw(panels: Sequence[Panel], note: str) -> str:
    """Horizontal bars, as SVG that follows the reader's colour scheme."""
    parts, y = [], 8
    for panel in panels:
        y += 22
        parts.append(f'<text class="title" x="0" y="{y}">{escape(panel.title)}</text>')
        top = y = y + 10
        most = max(*(bar.value for bar in panel.bars), panel.mark or 0)
        mark = _length(panel.mark, most, panel) if panel.mark else 0
        for bar in panel.bars:
            length = _length(bar.value, most, panel)
            kind = "own" if bar.own else "other"
            end = LEFT + max(length, mark) + 8
            parts += [
                f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(bar.name)}</text>',
                f'<rect class="{kind}" x="{LEFT}" y="{y + 3}" width="{length:.1f}" height="18"/>',
                f'<text x="{end:.1f}" y="{y + 16}">{escape(bar.said)}</text>',
            ]
            y += STEP
        if mark:
            parts.append(f'<path class="line" d="M{LEFT + mark:.1f} {top}V{y}"/>')
        y += 6
    y += 18
    parts.append(f'<text class="faint" x="0" y="{y}">{escape(note)}</text>')
    head = (
        f'<svg class="scheme" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}"'
        f' width="{WIDTH}">'
    )
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _length(value: float, most: float, panel: Panel) -> float:
    room = WIDTH - LEFT - RIGHT
    if not panel.log:
        return max(room * value / most, 1)
    low = 0.5  # half as fast: less than any row
    return room * math.log(value / low) / math.log(most / low)


def speed_table() -> str:
    """The README's table."""
    lines = ["| | pymerge | the other | times as fast |", "|---|---|---|---|"]
    for method, own, other, ratio in merges():
        what = f"whole process, {method}, 494M parameters in bf16, base and two models"
        cells = (what, seconds(own), f"mergekit-yaml {seconds(other)}", rounded(ratio))
        lines.append(f"| {' | '.join(cells)} |")
    what = "one tensor of 16M fp32 elements, four models, ties"
    for who, own, other, ratio in reversed(peers()):
        cells = (what, seconds(own), f"{who} {seconds(other)}", rounded(ratio))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_shares() -> str:
    """The README's sentence on the copy bandwidth."""
    shares: dict[tuple[bool, str], list[float]] = {}
    for op, family, _, percent in kernels():
        shares.setdefault((family == "fp32", op), []).append(percent)

    def spread(fp32: bool, op: str) -> str:
        return f"{min(shares[fp32, op]):.0f} to {max(shares[fp32, op]):.0f} %"

    return (
        "On tensors of 64M fp32 elements the TIES kernels move bytes at"
        f" {spread(True, tables.KNOWN)} of the machine's copy bandwidth with precomputed\n"
        f"thresholds, and at {spread(True, tables.WHOLE)} if they find the thresholds themselves;"
        f" with 16-bit models at {spread(False, tables.KNOWN)} and\n"
        f"{spread(False, tables.WHOLE)} ([all sizes, with the command](docs/benchmarks.md#ties))."
    )


def readme(text: str) -> str:
    """The README's text with its speeds between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"README.md lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{speed_table()}\n\n{speed_shares()}\n\n{END}{after}"


def outputs() -> dict[Path, str]:
    """All that this script writes."""
    return {
        IMAGES / "speed.svg": speed_chart(),
        IMAGES / "drop_ins.svg": drop_in_chart(),
        IMAGES / "kernels.svg": kernel_chart(),
        README: readme(README.read_text(encoding="utf-8")),
        tables.PAGE: tables.page(tables.PAGE.read_text(encoding="utf-8")),
    }


def main() -> None:
    for path, text in outputs().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
