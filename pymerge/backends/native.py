"""The compiled kernels: the only module that imports `pymerge._C`. Imports neither torch nor numpy.

Memory is passed as (address, dtype name) of contiguous elements, of any alignment; the caller keeps
it alive.

PYMERGE_CPU_LEVEL     portable, avx2 or avx512: this instruction set, or an error where it cannot
                      run; read at each call
PYMERGE_NUM_THREADS   what threads=0 means, instead of every processor that the process may run on
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from types import ModuleType

from pymerge.dtypes import KERNEL_CODES
from pymerge.messages.words import shown
from pymerge.rules.ties import ELECTIONS, MERGES, RESCALES, TRIMS, TiesRule, TiesStats

Buffer = tuple[int, str]

_TRIM = {"magnitude": 0, "none": 1, "outliers": 2, "random": 3, "magprune": 4}
_ELECT = {"sum": 0, "count": 1, "none": 2}
_MERGE = {"weighted_mean": 0, "mean": 1, "sum": 2, "max": 3}
_RESCALE = {"none": 0, "density": 1, "l1": 2, "l2": 3, "linf": 4}
assert (set(_TRIM), set(_ELECT), set(_MERGE), set(_RESCALE)) == tuple(
    map(set, (TRIMS, ELECTIONS, MERGES, RESCALES))
)

_LONGEST_LEVEL = 40  # letters
_MOST_THREADS = 1024  # of one call: more than any machine has processors for

_extension: ModuleType | None = None


def load() -> ModuleType:
    """`pymerge._C`, imported when first used."""
    global _extension
    if _extension is None:
        _extension = importlib.import_module("pymerge._C")
    return _extension


def why_not() -> str | None:
    """None where the compiled kernels can be imported, else the reason and the way out."""
    try:
        load()
    except ImportError as error:
        return (
            f"pymerge._C cannot be imported ({error}); build it with: pip install"
            " --no-build-isolation -e ."
        )
    return None


def why_not_cuda() -> str | None:
    """None where the CUDA kernels are compiled in and a device is there, else the reason."""
    missing = why_not()
    if missing is not None:
        return missing
    extension = load()
    if not extension.with_cuda:
        return "this build has no CUDA kernels; reinstall with PYMERGE_CUDA=1 and nvcc on PATH"
    reason: str | None = extension.cuda_why_not()
    return reason


def cuda() -> ModuleType:
    """The launchers of the CUDA kernels, for `pymerge.backends.cuda` and
    `pymerge.backends.cg.cuda`; RuntimeError where this build has none.
    """
    extension = load()
    if not extension.with_cuda:
        raise RuntimeError(
            "this build has no CUDA kernels; reinstall with PYMERGE_CUDA=1 and nvcc on PATH"
        )
    module: ModuleType = extension.cuda
    return module


def cpu_levels() -> dict[str, bool]:
    """Compiled instruction set levels, slowest first -> whether this processor supports them."""
    return dict(load().cpu_levels())


def cpu_level() -> str:
    """The level in use; ValueError where PYMERGE_CPU_LEVEL names an unknown or unsupported one."""
    level: str = load().cpu_level(forced_level())
    return level


def num_threads() -> int:
    """What threads=0 means: PYMERGE_NUM_THREADS, else the number of usable processors."""
    asked = os.environ.get("PYMERGE_NUM_THREADS")
    if asked:
        digits = asked.lstrip("0")
        if not (digits.isascii() and digits.isdecimal()):
            raise ValueError(
                f"PYMERGE_NUM_THREADS={shown(asked)} is not a positive integer; unset it to use"
                " every processor"
            )
        return thread_count(int(digits[:9]))
    count: int = load().available_threads()
    return count


def check_variables(threads: int = 0) -> None:
    """ValueError where a bad environment variable would affect kernels on so many threads."""
    cpu_level()
    if threads == 0:
        num_threads()


def ties(
    models: Sequence[Buffer],
    base: Buffer | None,
    out: Buffer,
    n: int,
    rule: TiesRule,
    threads: int = 0,
) -> TiesStats:
    """Merge K buffers of n elements into `out` by docs/spec/ties.md; all dtypes may differ.

    `out` overlaps no input; it and the inputs may be regions of mapped files. The bits do not
    depend on the number of threads nor on the level. Scratch is kept for the next call and stays
    below 64 MB.

    ValueError: a rule for another number of models, an unknown dtype or level.
    """
    kept, conflicts, non_finite, thresholds, positive, negative, _ = _ties(
        models, base, out, n, rule, threads
    )
    return TiesStats(
        kept=kept,
        conflicts=conflicts,
        non_finite=non_finite,
        thresholds=thresholds,
        positive=positive,
        negative=negative,
    )


def ties_path(
    models: Sequence[Buffer],
    base: Buffer | None,
    out: Buffer,
    n: int,
    rule: TiesRule,
    threads: int = 0,
) -> str:
    """As `ties`, but returns how the thresholds were found; for benchmarks and tests."""
    path: str = _ties(models, base, out, n, rule, threads)[-1]
    return path


def ties_seconds(
    models: Sequence[Buffer],
    base: Buffer | None,
    out: Buffer,
    n: int,
    rule: TiesRule,
    repeats: int,
) -> float:
    """The least time in seconds of `repeats` calls of `ties` on one thread; for benchmarks."""
    seconds: float = load().ties_seconds(
        [pointer(b) for b in models],
        None if base is None else pointer(base),
        pointer(out),
        n,
        _numbers(rule),
        repeats,
        forced_level(),
    )
    return seconds


def _ties(
    models: Sequence[Buffer], base: Buffer | None, out: Buffer, n: int, rule: TiesRule, threads: int
) -> tuple[tuple[int, ...], int, tuple[int, ...], tuple[float, ...], int, int, str]:
    result: tuple[tuple[int, ...], int, tuple[int, ...], tuple[float, ...], int, int, str] = (
        load().ties(
            [pointer(b) for b in models],
            None if base is None else pointer(base),
            pointer(out),
            n,
            _numbers(rule),
            thread_count(threads),
            forced_level(),
        )
    )
    return result


def _numbers(rule: TiesRule) -> dict[str, object]:
    return {
        "trim": _TRIM[rule.trim],
        "elect": _ELECT[rule.elect],
        "merge": _MERGE[rule.merge],
        "zero_majority": rule.zero_sign == "majority",
        "rescale": _RESCALE[rule.rescale],
        "weights": rule.weights,
        "elect_weights": rule.elect_weights,
        "densities": rule.densities,
        "ranks": rule.ranks,
        "dropped": rule.dropped,
        "scaling": rule.scaling,
        "key": rule.key,
        "thresholds": rule.thresholds,
        "bounds": rule.bounds,
        "majority": rule.majority,
        "factors": rule.factors,
        "first": rule.first,
        "epsilons": rule.epsilons or (0.0,) * len(rule.weights),
        "row_length": rule.row_length,
        "row_step": rule.row_step,
    }


def precomputed(
    models: Sequence[Buffer],
    base: Buffer | None,
    out_dtype: str,
    n: int,
    rule: TiesRule,
    threads: int = 0,
) -> TiesRule:
    """The rule with the thresholds (T3) and norm factors (T9) of the whole tensor filled in, so
    that its parts can be merged one by one.

    Reads the inputs as `ties` does and finds the same numbers. The majority sign is left open.
    """
    thresholds, bounds, factors = load().precompute(
        [pointer(b) for b in models],
        None if base is None else pointer(base),
        pointer((0, out_dtype))[1],
        n,
        _numbers(rule),
        thread_count(threads),
        forced_level(),
    )
    found: dict[str, object] = {}
    if rule.trim in ("magnitude", "outliers"):
        found["thresholds"] = thresholds
    if rule.trim == "outliers":
        found["bounds"] = bounds
    if rule.rescale in ("l1", "l2", "linf"):
        found["factors"] = factors
    return rule.with_precomputed(**found)


def select(
    tensors: Sequence[tuple[Sequence[Buffer], Buffer | None, int]],
    ranks: Sequence[int],
    threads: int = 0,
) -> list[float]:
    """The ranks[k]-th largest |models[k] - base| over all the tensors, as if concatenated (T3, T7).

    tensors: (models, base, number of elements) each. Rank 0 gives NaN, a rank of all elements or
        more gives 0.
    """
    segments = [
        ([pointer(b) for b in models], None if base is None else pointer(base), n)
        for models, base, n in tensors
    ]
    thresholds: list[float] = load().select(
        segments, list(ranks), thread_count(threads), forced_level()
    )
    return thresholds


def copy(sources: Sequence[int], out: int, nbytes: int, threads: int = 0) -> None:
    """Read the sources and write `out`, `nbytes` bytes each, doing nothing else: what a merge is
    measured against.

    sources: one address or more (base and models). out: an address on a 64-byte boundary; its bytes
    are the exclusive or of the sources'. Only whole cache lines are moved. ValueError for other
    numbers of sources and other boundaries.
    """
    load().copy(list(sources), out, nbytes, thread_count(threads), forced_level())


def count_non_finite(tensor: Buffer, n: int, threads: int = 0) -> int:
    """How many of n contiguous elements, at any alignment, are NaN or infinite. Reads each once."""
    count: int = load().count_non_finite(pointer(tensor), n, thread_count(threads), forced_level())
    return count


def add_low_rank(
    base: Buffer,
    left: int,
    right: tuple[int, int],
    rank: int,
    scale: float,
    out: Buffer,
    shape: tuple[int, int],
) -> None:
    """out = base + scale (left right) of `shape` (rows, columns), on the calling thread
    (docs/spec/low_rank.md).

    left: the address of (rows, rank) elements of the dtype of `out`, float32 or float64. right: the
    address of `rank` rows of as many columns, and from one row to the next so many elements. out
    overlaps nothing. ValueError for rank 0, and for a float64 base with a float32 out.
    """
    load().add_low_rank(
        pointer(base), left, *right, rank, scale, pointer(out), *shape, forced_level()
    )


def cg_dot(x: Buffer, y: Buffer, layers: int, n: int, threads: int = 0) -> list[float]:
    """<x, y> of each of `layers` layers of n elements, one behind the other; float32 or float64
    (docs/spec/mats.md, M6).

    This and the next two: products and sums in binary64; the bits depend neither on the threads nor
        on the level.
    """
    address, dtype = pointer(x)
    sums: list[float] = load().cg_dot(
        address, y[0], layers, n, dtype, thread_count(threads), forced_level()
    )
    return sums


def cg_advance(
    step: Buffer, r: Buffer, p: Buffer, q: Buffer, alpha: Sequence[float], n: int, threads: int = 0
) -> list[tuple[float, float]]:
    """step += alpha p and r -= alpha q, nothing for layers with alpha 0. Returns each layer's (<r,
    r>, <step, step>).
    """
    address, dtype = pointer(step)
    sums: list[tuple[float, float]] = load().cg_advance(
        address, r[0], p[0], q[0], list(alpha), n, dtype, thread_count(threads), forced_level()
    )
    return sums


def cg_turn(
    p: Buffer, z: Buffer, step: Buffer, beta: Sequence[float], n: int, threads: int = 0
) -> list[tuple[float, float]]:
    """p = z + beta p; p = z for layers with beta 0. Returns each layer's (<p, p>, <step, p>)."""
    address, dtype = pointer(p)
    sums: list[tuple[float, float]] = load().cg_turn(
        address, z[0], step[0], list(beta), n, dtype, thread_count(threads), forced_level()
    )
    return sums


# Mapped files that are truncated while they are read (csrc/cpu/core/mapped.h).


@contextlib.contextmanager
def surviving_lost_pages(*, any_mapping: bool = False) -> Iterator[None]:
    """Inside, reading a watched mapping of a truncated file gives zeros instead of a fatal SIGBUS.
    any_mapping: covers mappings of other libraries too; `lost_pages` counts them.

    Installs a process-wide signal handler in front of the present one: for programs, not for
    libraries.
    """
    if why_not() is not None:  # said where the kernels are used
        yield
        return
    load().install_bus_handler(any_mapping)
    try:
        yield
    finally:
        load().remove_bus_handler()


def survives_lost_pages() -> bool:
    """Whether `surviving_lost_pages` is active."""
    return _extension is not None and bool(_extension.bus_handler_installed())


def watch_mapping(address: int, nbytes: int) -> int:
    """A handle for `mapping_lost`; pass it to `forget_mapping` before unmapping the memory."""
    handle: int = load().watch_mapping(address, nbytes)
    return handle


def forget_mapping(handle: int) -> None:
    """The end of `watch_mapping`."""
    load().forget_mapping(handle)


def mapping_lost(handle: int) -> bool:
    """Whether a part of this mapping became zeros."""
    return bool(load().mapping_lost(handle))


def lost_pages() -> int:
    """How often any mapping lost pages since the process began."""
    return 0 if _extension is None else int(_extension.lost_pages())


def thread_count(threads: int) -> int:
    """The number of threads for a call; kernels continue with fewer if the system starts fewer."""
    return min(threads, _MOST_THREADS) or num_threads()


def forced_level() -> str:
    """PYMERGE_CPU_LEVEL, "" where unset; ValueError for what cannot be the name of a level. The
    extension checks that it is one, and takes text alone.
    """
    level = os.environ.get("PYMERGE_CPU_LEVEL", "")
    if not level.isascii() or len(level) > _LONGEST_LEVEL:
        usable = ", ".join(name for name, runs in cpu_levels().items() if runs)
        raise ValueError(
            f"PYMERGE_CPU_LEVEL={shown(level)} is not a level of this build; available here:"
            f" {usable}"
        )
    return level


def pointer(buffer: Buffer) -> tuple[int, int]:
    address, dtype = buffer
    if dtype not in KERNEL_CODES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(map(repr, KERNEL_CODES))}")
    return address, KERNEL_CODES[dtype]
