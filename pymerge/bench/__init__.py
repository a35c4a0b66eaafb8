"""`pymerge bench`: each kernel's time as a share of the copy bandwidth measured in the same run,
beside the peers.

Every row is gated on correctness first. Rows: threshold-known application and the whole op `ties`,
per merge, family of tensors, number of models and size; with --peers, the other implementations at
their own speed. With --cache instead what a core takes where the memory does not count.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pymerge.bench.machine import describe_machine, memory_bytes
from pymerge.bench.results import Row, check_free, check_free_to_share, share, show, write
from pymerge.errors import as_resource_errors

if TYPE_CHECKING:
    from pymerge.bench.peers import Peer

# Names of cases.FAMILIES, which takes torch.
FAMILIES = ("fp32", "bf16-light", "bf16-ulps", "bf16-spread", "fp16", "mixed")
MERGES = (
    "ties", "linear", "weights", "count", "max", "breadcrumbs", "dare-linear", "dare-ties",
    "ties-l1", "gram", "gram-rows", "gram-columns",
)  # fmt: skip
MOST_MODELS = 64
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(argv: Sequence[str] | None = None) -> Any:
    """Run the command line `pymerge bench` with the given arguments; raises SystemExit for wrong
    ones, and KeyboardInterrupt.
    """
    arguments = None if argv is None else list(argv)
    try:
        with as_resource_errors():
            # Not `command.main`, which would take it for a failure that nobody reads on.
            words = sys.argv[1:] if arguments is None else arguments
            with command.make_context("pymerge bench", words) as context:
                return command.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.Abort:
        raise KeyboardInterrupt from None


def _each(
    parse: Callable[[str], Any],
) -> Callable[[click.Context, click.Parameter, str], list[Any]]:
    """A callback for an option that takes several values, with commas between them."""

    def parsed(ctx: click.Context, parameter: click.Parameter, value: str) -> list[Any]:
        try:
            return [parse(each.strip()) for each in value.split(",")]
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return parsed


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def checked(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return checked


def _count(text: str) -> int:
    if (
        not (text.isascii() and text.isdecimal())
        or len(text) > 2
        or not 1 <= int(text) <= MOST_MODELS
    ):
        raise ValueError(f"{text!r} is not a number of models from 1 to {MOST_MODELS}")
    return int(text)


def _whole(
    least: int, most: int | None = None
) -> Callable[[click.Context, click.Parameter, str | None], int | None]:
    """A callback for an integer in the digits 0 to 9."""

    def parsed(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
        if value is None:
            return None
        number = int(value) if re.fullmatch(r"[0-9]{1,9}", value) else -1
        if number < least or (most is not None and number > most):
            allowed = f"from {least} on" if most is None else f"from {least} to {most}"
            raise click.BadParameter(f"{value!r} is not an integer {allowed}")
        return number

    return parsed


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text.upper(), re.ASCII)
    count = float(match[1]) * _UNITS[match[2]] if match else 0
    if not 1 <= count < 1 << 40:
        raise ValueError(f"{text!r} is not a number of elements; pass e.g. 65536, 64K, 16M, 1G")
    return int(count)


def _device(ctx: click.Context, parameter: click.Parameter, value: str) -> int | None:
    """A GPU's number, None for the CPU."""
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", value, re.ASCII)
    if match is None:
        raise click.BadParameter(
            f"{value!r} is not one of 'cpu', 'cuda', 'cuda:1' (a GPU's number)"
        )
    return None if value == "cpu" else int(match[1] or 0)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--size",
    "sizes",
    default="16M,64M",
    show_default=True,
    metavar="N,...",
    callback=_each(_parse_size),
    help="Elements of a tensor; K, M and G are powers of 1024.",
)
@click.option(
    "--models",
    "counts",
    default="2,4,8",
    show_default=True,
    metavar="K,...",
    callback=_each(_count),
    help=f"How many models are merged, 1 to {MOST_MODELS}.",
)
@click.option(
    "--family",
    "families",
    default=",".join(FAMILIES[:3]),
    show_default=True,
    metavar="NAME,...",
    callback=_each(_one_of(FAMILIES)),
    help="Kinds of tensors: their dtype, and how far the models are from the base.",
)
@click.option(
    "--merge",
    "merges",
    default="ties",
    show_default=True,
    metavar="NAME,...",
    callback=_each(_one_of(MERGES)),
    help=f"What is merged: {', '.join(MERGES)}.",
)
@click.option(
    "--cache",
    is_flag=True,
    help="Time one thread on tensors that stay in its cache instead, thresholds known.",
)
@click.option(
    "--repeats",
    default="15",
    show_default=True,
    metavar="N",
    callback=_whole(1),
    help="Timed calls a row.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    callback=_device,
    help="Where to run: cpu, cuda, or cuda:N; on a GPU times are those of the device.",
)
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Of the kernels; auto: the fastest for this machine.",
)
@click.option(
    "--threads",
    metavar="N",
    callback=_whole(0, os.cpu_count() or 1),
    help=(
        "How many CPU threads compute; 0 takes as many as the process may use.  [default: as many"
        " as torch takes]"
    ),
)
@click.option(
    "--peers/--no-peers",
    default=False,
    show_default=True,
    help="Also time peft and mergekit, where they are installed; slow.",
)
@click.option(
    "--official",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Also time the official code: src/utils/merge_utils.py of a TIES-Merging checkout.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="NAME",
    help="Write the results to NAME.json and NAME.csv.",
)
@click.option(
    "--share",
    "shared",
    is_flag=False,
    flag_value="pymerge-bench.json",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="[FILE]",
    help=(
        "Write what a bug report needs to FILE, pymerge-bench.json by default: machine, versions"
        " and results; no paths, and no names of users or hosts."
    ),
)
def command(
    sizes: list[int],
    counts: list[int],
    families: list[str],
    merges: list[str],
    cache: bool,
    repeats: int,
    device: int | None,
    backend: str,
    threads: int | None,
    peers: bool,
    official: Path | None,
    out: Path | None,
    shared: Path | None,
) -> None:
    """Time the kernels against the memory's bandwidth."""
    if cache and device is not None:
        raise click.BadParameter("is for a core of the CPU", param_hint="'--cache'")
    if cache and shared is not None:
        raise click.BadParameter("is for the results without --cache", param_hint="'--share'")
    place = _place(device)
    if not cache:
        _check_memory(max(sizes), max(counts), device)
    if out is not None:
        check_free(out)
    if shared is not None:
        check_free_to_share(shared, out)
    if threads is not None:
        import torch

        from pymerge.backends import native

        try:
            torch.set_num_threads(threads or native.num_threads())
        except ValueError as error:  # the variable's
            raise click.ClickException(str(error)) from None
    from pymerge.backends import registry

    try:
        registry.pick("ties", place.device.type, backend)
    except (ValueError, RuntimeError) as error:
        if backend == "auto":  # then it is the variable's
            raise click.ClickException(str(error)) from None
        raise click.BadParameter(str(error), param_hint="'--backend'") from None
    if cache:
        from pymerge.bench.cache import measure

        measure(counts, families, merges, repeats)
        return
    with_peers, code = peers or official is not None, None
    if official is not None:
        from pymerge.bench.peers import read_official

        try:
            code = read_official(official)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="'--official'") from None
    rows, peer_rows = run(
        sizes, counts, families, merges, repeats, backend, with_peers, code, place
    )
    chosen = registry.choose(place.device.type, backend)
    machine = {**describe_machine(), "backend": chosen, **place.describe()}
    show(rows, peer_rows, machine)
    if out is not None:
        write(out, rows, peer_rows, machine)
    if shared is not None:
        share(shared, rows, peer_rows, machine)
        click.echo(f"{shared} can go into a bug report", err=True)


def _place(device: int | None) -> Any:
    from pymerge.bench.places import Gpu, Host

    if device is None:
        return Host()
    import torch

    if not torch.cuda.is_available() or device >= torch.cuda.device_count():
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise click.ClickException(
            f"--device cuda:{device} is not there: torch sees {there} CUDA devices; see `pymerge"
            " doctor`, or leave --device out"
        )
    return Gpu(device)


def _check_memory(n: int, count: int, device: int | None) -> None:
    """The models, base and output, and what makes them, in fp32; on a GPU those of the copy
    too.
    """
    needed = 4 * n * (count + 4)
    there = memory_bytes()
    if device is not None:
        import torch

        needed, there = 2 * needed, torch.cuda.mem_get_info(device)[0]
    if needed > there:
        raise click.BadParameter(
            f"{n} elements of {count} models take {needed / 1e9:.0f} GB and this"
            f" {'machine' if device is None else 'GPU'} has {there / 1e9:.0f} GB of memory; pass a"
            " smaller one, or fewer --models",
            param_hint="'--size'",
        )


def run(
    sizes: Sequence[int],
    counts: Sequence[int],
    families: Sequence[str],
    merges: Sequence[str],
    repeats: int,
    backend: str = "auto",
    with_peers: bool = False,
    official: Peer | None = None,
    place: Any = None,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """The table's rows, and one dict per peer. place: a `Place`; the CPU by default."""
    from pymerge.backends import registry
    from pymerge.bench import cases, gram, peers
    from pymerge.bench.places import Gpu

    place = _place(None) if place is None else place
    rows: list[Row] = []
    peer_rows: list[dict[str, Any]] = []
    name, ties = registry.pick("ties", place.device.type, backend)
    records = name != "reference"  # which waits for the device
    for family in families:
        for n in sizes:
            everything = cases.make(cases.FAMILIES[family], n, max(counts), device=place.device)
            for count in counts:
                tensors = everything.head(count)
                for merge in merges:
                    if merge in gram.PER:
                        gram.gate(tensors, name, merge)
                        for op, call, bound, nbytes in gram.calls(tensors, name, merge, place):
                            timing = place.alternate(call, bound, repeats)
                            rows.append(_row(op, merge, family, count, n, nbytes, timing))
                        if with_peers and merge == "gram" and family == "fp32" and n <= 1 << 24:
                            peer_rows += [
                                _beside_peer(
                                    place, tensors, ("mergekit", method, family), theirs,
                                    partial(ours, tensors),
                                )
                                for method, (theirs, ours) in gram.peers().items()
                            ]  # fmt: skip
                        continue
                    cases.gate(tensors, name, merge)
                    known = cases.known_rule(tensors, merge)
                    whole = cases.rule_for(tensors, merge)
                    ops = [("thresholds known", known)] if known != whole else []
                    for op, rule in (*ops, ("ties", whole)):
                        timing = place.alternate(
                            lambda rule=rule, t=tensors: ties(t.models, t.base, rule, t.out),
                            place.copy(tensors),
                            repeats,
                            out=tensors.out if records else None,
                        )
                        rows.append(_row(op, merge, family, count, n, tensors.bytes, timing))
                    if with_peers and n <= 1 << 24:
                        peer_rows += [
                            _beside_peer(
                                place,
                                tensors,
                                (peer, merge, family),
                                theirs,
                                partial(ties, tensors.models, tensors.base, whole, tensors.out),
                            )
                            for peer, theirs in peers.available(merge, official).items()
                        ]
            del everything
    if isinstance(place, Gpu):
        from pymerge.bench.device_ops import measure

        rows += [_row(*measured) for measured in measure(place, name, repeats)]
    return rows, peer_rows


def _row(op: str, merge: str, family: str, count: int, n: int, nbytes: int, timing: Any) -> Row:
    click.echo(
        f"  {op:17} {merge} {family:11} K={count} n={n:,}: {timing.p50:.2f} ms,"
        f" {timing.percent_of_copy:.0f} % of copy",
        err=True,
    )
    times = timing.p20, timing.p50, timing.p80
    rates = nbytes / 1e6 / timing.p50, nbytes / 1e6 / timing.copy_ms
    return Row(op, merge, family, count, n, *times, *rates, timing.percent_of_copy)


def _beside_peer(
    place: Any,
    tensors: Any,
    about: tuple[str, str, str],
    theirs: Callable[[Any], Any],
    ours: Callable[[], Any],
) -> dict[str, Any]:
    """Another implementation in turn with this one. about: who, what is merged, and which family of
    tensors.
    """
    timing = place.alternate(lambda: theirs(tensors), ours, 3, 60.0)
    peer, merge, family = about
    count, ratio = len(tensors.models), timing.p50 / timing.copy_ms
    click.echo(
        f"  {peer} {merge} {family} K={count} n={tensors.n:,}: {timing.p50:.0f} ms, {ratio:.1f}"
        " times ours",
        err=True,
    )
    return {
        "peer": peer, "merge": merge, "family": family, "models": count, "n": tensors.n,
        "ms_p50": timing.p50, "pymerge_ms_p50": timing.copy_ms, "ratio": ratio,
    }  # fmt: skip
