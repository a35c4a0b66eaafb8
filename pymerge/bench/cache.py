"""`pymerge bench --cache`: what a core takes for 16 elements where the memory does not count."""

from __future__ import annotations

from collections.abc import Sequence

import click

from pymerge.backends import native
from pymerge.bench import cases

BYTES = 512 << 10  # of all tensors together
CALLS = 200  # a repetition


def measure(
    counts: Sequence[int], families: Sequence[str], merges: Sequence[str], repeats: int
) -> None:
    """Print a row for each: the least time of one call on one thread, thresholds known.

    The least, since whatever else the machine does only adds to it; tensors of half a megabyte
    together, which stay in the second-level cache of one core from call to call.
    """
    click.echo(f"level {native.cpu_level()}; least of {repeats * CALLS} calls")
    click.echo(f"{'merge':12} {'tensors':12} {'K':>3} {'ns for 16':>10} {'GB/s a core':>12}")
    for family in families:
        for count in counts:
            tensors = cases.make(cases.FAMILIES[family], 1 << 10, count)
            n = BYTES // (tensors.bytes >> 10) // 2048 * 2048
            tensors = cases.make(cases.FAMILIES[family], max(n, 2048), count)
            for merge in merges:
                cases.gate(tensors, "cpu", merge)
                known = cases.known_rule(tensors, merge)
                seconds = native.ties_seconds(
                    *cases.buffers(tensors), tensors.n, known, repeats * CALLS
                )
                click.echo(
                    f"{merge:12} {family:12} {count:3} {1e9 * seconds / (tensors.n / 16):10.2f}"
                    f" {tensors.bytes / seconds / 1e9:12.1f}"
                )
