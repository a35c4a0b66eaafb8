"""What `pymerge bench` measured: a row each, the tables that a person reads, the files."""

from __future__ import annotations

import csv
import io
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pymerge.bench.machine import memory_bytes, system, usable_cpus, versions
from pymerge.checkpoint import new_file
from pymerge.errors import OutputError
from pymerge.version import __version__


@dataclass(frozen=True)
class Row:
    op: str
    merge: str
    family: str
    models: int
    n: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    gb_per_s: float
    copy_gb_per_s: float
    percent_of_copy: float


def show(rows: Sequence[Row], peer_rows: Sequence[dict[str, Any]], machine: dict[str, Any]) -> None:
    """The tables that a person reads."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    with console.capture() as shown:
        console.print(
            (
                machine["gpu"]
                if "gpu" in machine
                else f"{machine['cpu']}, {machine['threads']} threads"
            )
            + f", level {machine['cpu_level']}, {machine['date']}",
            style="dim",
        )
        table = Table(title="Share of the copy bandwidth measured in the same run")
        for column in ("op", "merge", "tensors", "K", "elements", "ms", "GB/s", "% of copy"):
            words = column in ("op", "merge", "tensors")
            table.add_column(column, justify="left" if words else "right")
        for row in rows:
            table.add_row(
                row.op, row.merge, row.family, str(row.models), f"{row.n:,}", f"{row.ms_p50:.2f}",
                f"{row.gb_per_s:.1f}", f"{row.percent_of_copy:.0f}",
            )  # fmt: skip
        console.print(table)
        if peer_rows:
            table = Table(title="Other implementations of the same merge")
            for column in (
                "",
                "merge",
                "tensors",
                "K",
                "elements",
                "ms",
                "pymerge ms",
                "times as fast",
            ):
                words = column in ("", "merge", "tensors")
                table.add_column(column, justify="left" if words else "right")
            for peer in peer_rows:
                table.add_row(
                    peer["peer"], peer["merge"], peer["family"], str(peer["models"]),
                    f"{peer['n']:,}", f"{peer['ms_p50']:,.0f}", f"{peer['pymerge_ms_p50']:.1f}",
                    f"{peer['ratio']:,.1f}",
                )  # fmt: skip
            console.print(table)
    click.echo(shown.get(), nl=False)


def write(
    out: Path, rows: Sequence[Row], peer_rows: Sequence[dict[str, Any]], machine: dict[str, Any]
) -> None:
    """OUT.json with everything, OUT.csv with a line a row."""
    as_json, as_csv = _files(out)
    everything = {"machine": machine, "rows": [vars(r) for r in rows], "peers": list(peer_rows)}
    new_file.write(as_json, (json.dumps(everything, indent=1) + "\n").encode())
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow([*Row.__dataclass_fields__, *machine])
    for row in rows:
        writer.writerow(
            [
                *(f"{v:.4g}" if isinstance(v, float) else v for v in vars(row).values()),
                *machine.values(),
            ]
        )
    new_file.write(as_csv, table.getvalue().encode())


def _files(out: Path) -> tuple[Path, Path]:
    stem = out.with_suffix("") if out.suffix in (".json", ".csv") else out
    return Path(f"{stem}.json"), Path(f"{stem}.csv")


def share(
    path: Path, rows: Sequence[Row], peer_rows: Sequence[dict[str, Any]], machine: dict[str, Any]
) -> None:
    """Write the JSON of a bug report: the results with versions, memory and backends beside them,
    without what tells who measured.
    """
    from pymerge.backends import native, registry

    everything = {
        "pymerge": __version__,
        "machine": {
            **machine,
            "system": system(),
            "usable_cpus": usable_cpus(),
            "memory_gib": round(memory_bytes() / 2**30, 1),
            "cpu_levels": native.cpu_levels(),
        },
        "versions": versions(),
        "backends": {name: registry.why_not(name) or "available" for name in registry.BACKENDS},
        "rows": [vars(row) for row in rows],
        "peers": list(peer_rows),
    }
    new_file.write(path, (json.dumps(without_places(everything), indent=1) + "\n").encode())


# From a separator to the last one before a space, a quote or the end: a name may follow.
_FOLDERS = re.compile(
    r"(?:[A-Za-z]:)?(?<![\w.])(?:~|\.{1,2})?(?:[\\/][^\\/\s'\"]+)*[\\/](?=[^\s'\"])"
)


def without_places(value: Any) -> Any:
    """A JSON value whose texts have no folders, only names of files, and no names of this user and
    host.
    """
    if isinstance(value, dict):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    if not isinstance(value, str):
        return value
    text = _FOLDERS.sub("", value)
    for name in (Path.home().name, platform.node()):
        if len(name) > 2:
            text = re.sub(rf"\b{re.escape(name)}\b", "...", text)
    return text


def check_free(out: Path) -> None:
    """click.BadParameter where a file would be replaced that is not this command's own, OutputError
    where none can be made.
    """
    if out.name in ("", ".."):
        raise click.BadParameter(f"{str(out)!r} names no file; give a name", param_hint="--out")
    own_files = (rb'\{\n "machine": \{', rb"op,merge,family,models,n,")
    for path, own in zip(_files(out), own_files, strict=True):
        _check_own(path, own, "--out")


def check_free_to_share(path: Path, out: Path | None = None) -> None:
    """The same for the file of `share`, which none of the results in `out` may be."""
    if out is not None and path.resolve() in [each.resolve() for each in _files(out)]:
        raise click.BadParameter(f"{path} is a file of --out too", param_hint="--share")
    _check_own(path, rb'\{\n "pymerge": ', "--share")


def _check_own(path: Path, begins: bytes, option: str) -> None:
    try:
        new_file.check_own(path, re.compile(begins), "results of this command")
    except OutputError as error:
        raise click.BadParameter(str(error), param_hint=option) from None
    new_file.check_place(path)
