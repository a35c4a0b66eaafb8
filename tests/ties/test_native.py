"""What is the compiled kernels' own: levels, threads, scratch, alignment, block edges, and that
every way of finding the thresholds is taken and exact. The rules themselves are in test_ties.py.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import random
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
from gpu_cases import differences, draw, draw_alike, parts_differ
from ties_cases import DISTRIBUTIONS, family, same_bits, ulp_family

from pymerge.backends import cpu, native
from pymerge.bench.cases import MERGES
from pymerge.reference import ties as reference
from pymerge.rules.ties import TiesStats, resolve_options

NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}
LEVELS = [level for level, usable in native.cpu_levels().items() if usable]
ONE_PASS = 1 << 18  # from here on the thresholds are found while merging


def buffer(tensor):
    return tensor.data_ptr(), NAMES[tensor.dtype]


def run(models, base, rule, *, threads=1, out=None, out_dtype=None):
    """(out, stats) of the kernels; out NaN-filled before."""
    like = models[0] if base is None else base
    if out is None:
        out = torch.full((like.numel(),), math.nan, dtype=out_dtype or like.dtype)
    stats = native.ties(
        [buffer(m) for m in models],
        None if base is None else buffer(base),
        buffer(out),
        out.numel(),
        rule,
        threads,
    )
    return out, stats


def expected(models, base, rule, out_dtype=None):
    like = models[0] if base is None else base
    out = torch.full((like.numel(),), math.nan, dtype=out_dtype or like.dtype)
    return out, reference.ties(models, base, rule, out)


def check(models, base, rule, *, threads=1, out_dtype=None):
    got, stats = run(models, base, rule, threads=threads, out_dtype=out_dtype)
    want, wanted = expected(models, base, rule, out_dtype)
    assert same_bits(got, want), f"{int((got != want).sum())} of {got.numel()} elements differ"
    assert repr(stats) == repr(wanted)  # NaN thresholds are equal in a repr
    return stats


def path(models, base, rule, threads=2):
    out = torch.empty_like(models[0] if base is None else base)
    return native.ties_path(
        [buffer(m) for m in models],
        None if base is None else buffer(base),
        buffer(out),
        out.numel(),
        rule,
        threads,
    )


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("PYMERGE_CPU_LEVEL", request.param)
    return request.param


# For what costs seconds and hardly asks about a level's own code: how thresholds are found.
best_level_first = pytest.mark.parametrize(
    "level",
    [LEVELS[-1], *(pytest.param(one, marks=pytest.mark.slow) for one in LEVELS[:-1])],
    indirect=True,
)


# --- levels and threads
# -------------------------------------------------------------------------------------------


def test_the_portable_level_is_always_there_and_the_best_is_taken(monkeypatch):
    monkeypatch.delenv("PYMERGE_CPU_LEVEL", raising=False)
    assert native.cpu_levels()["portable"]
    assert native.cpu_level() == LEVELS[-1]


def test_a_forced_level_runs(level):
    assert native.cpu_level() == level


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx512 "])
def test_an_unknown_level_is_an_error_that_says_what_there_is(monkeypatch, name):
    monkeypatch.setenv("PYMERGE_CPU_LEVEL", name)
    models, base = family(100, 2)
    rule = resolve_options(2).rule(100)
    for call in (native.cpu_level, lambda: run(models, base, rule)):
        with pytest.raises(
            ValueError, match=f"PYMERGE_CPU_LEVEL={name} is not a level.*available here: portable"
        ):
            call()


def test_num_threads_follows_the_environment(monkeypatch):
    monkeypatch.setenv("PYMERGE_NUM_THREADS", "3")
    assert native.num_threads() == 3
    monkeypatch.setenv("PYMERGE_NUM_THREADS", "none")
    with pytest.raises(ValueError, match="PYMERGE_NUM_THREADS='none' is not a positive integer"):
        native.num_threads()
    monkeypatch.delenv("PYMERGE_NUM_THREADS")
    assert native.num_threads() == len(os.sched_getaffinity(0))


def test_unknown_dtypes_and_rules_of_another_size_are_errors():
    models, base = family(10, 2)
    with pytest.raises(ValueError, match="dtype 'int8' is not one of 'float32'"):
        native.ties([(0, "int8")], None, buffer(base), 10, resolve_options(1).rule(10))
    with pytest.raises(ValueError, match="another number of models than 2"):
        run(models, base, resolve_options(3).rule(10))
    with pytest.raises(ValueError, match="2 models for 1 ranks"):
        native.select([([buffer(m) for m in models], buffer(base), 10)], [1])


@pytest.mark.parametrize("n", [5000, ONE_PASS + 77])
def test_any_number_of_threads_gives_the_same_bits(level, n):
    models, base = family(n, 3, "blocks", [torch.bfloat16])
    rule = resolve_options(3).rule(n)
    want, wanted = run(models, base, rule)
    for threads in (2, 3, 7, 40):
        got, stats = run(models, base, rule, threads=threads)
        assert same_bits(got, want) and stats == wanted


def test_calls_from_many_threads_do_not_meet():
    n = ONE_PASS + 5
    jobs = [family(n, 2, seed=seed) for seed in range(4)]
    rule = resolve_options(2).rule(n)
    wanted = [run(*job, rule) for job in jobs]
    failures = []

    def work(number):
        for _ in range(5):
            out, stats = run(*jobs[number], rule, threads=1 + number % 3)
            if not same_bits(out, wanted[number][0]) or stats != wanted[number][1]:
                failures.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("call", ["ties", "select", "count_non_finite"])
def test_other_threads_run_meanwhile(call):
    """The GIL is released: no thread is made to give it up here, so the other one's turn comes
    during calls or never.
    """
    n = 1 << 20
    models, base = family(n, 2)
    rule = resolve_options(2).rule(n)
    out = torch.empty(n)
    pairs = [buffer(m) for m in models]
    calls = {
        "ties": lambda: native.ties(pairs, buffer(base), buffer(out), n, rule, 1),
        "select": lambda: native.select([(pairs, buffer(base), n)], rule.ranks, 1),
        "count_non_finite": lambda: native.count_non_finite(buffer(base), n, 1),
    }
    turns, stop = [], threading.Event()

    def take_turns():
        while not stop.is_set():
            turns.append(None)
            time.sleep(1e-5)

    before = sys.getswitchinterval()
    other = threading.Thread(target=take_turns)
    try:
        sys.setswitchinterval(600)
        other.start()
        while not turns:
            time.sleep(1e-3)
        first = len(turns)
        for _ in range(2000):
            calls[call]()
            if len(turns) > first:
                break
        assert len(turns) > first
    finally:
        sys.setswitchinterval(before)
        stop.set()
        other.join()


def in_a_new_process(code, timeout=600):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_forked_child_works_after_its_parent_used_threads():
    in_a_new_process("""
        import array, os
        from pymerge.backends import native
        from pymerge.rules.ties import resolve_options
        n = 1 << 20
        x = array.array("f", (float(i % 1013) for i in range(n)))
        out = array.array("f", bytes(4 * n))
        rule = resolve_options(1).rule(n)
        call = lambda: native.ties([(x.buffer_info()[0], "float32")], None, (out.buffer_info()[0], "float32"), n, rule, 3)
        stats = call()
        child = os.fork()
        if child == 0:
            os._exit(0 if call() == stats else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert call() == stats
        """)


def test_small_tensors_start_no_threads_and_nothing_imports_torch_or_numpy():
    out = in_a_new_process("""
        import array, os, sys
        from pymerge.backends import native
        from pymerge.rules.ties import resolve_options
        x = array.array("f", range(1000))
        out = array.array("f", bytes(4000))
        native.ties([(x.buffer_info()[0], "float32")], None, (out.buffer_info()[0], "float32"), 1000,
                     resolve_options(1).rule(1000), 8)
        print(len(os.listdir("/proc/self/task")), sorted({"torch", "numpy"} & set(sys.modules)))
        """)
    assert out.split(maxsplit=1) == ["1", "[]\n"]


def test_subnormal_numbers_are_kept_where_the_caller_flushes_them(level):
    models, base = family(ONE_PASS, 2, "subnormal")
    models, base = [m * 0 + 1e-39 * (k + 1) for k, m in enumerate(models)], base * 0
    rule = resolve_options(2, density=1.0).rule(ONE_PASS)
    torch.set_flush_denormal(True)
    try:
        out, _ = run(models, base, rule, threads=2)
    finally:
        torch.set_flush_denormal(False)
    assert (
        same_bits(out, expected(models, base, rule)[0])
        and int(torch.count_nonzero(out)) == ONE_PASS
    )


# --- memory
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "millions"), [(8, 6), (64, 2)])
def test_scratch_stays_below_64_mb_and_is_not_taken_anew(count, millions):
    out = in_a_new_process(f"""
        import mmap, resource
        from pymerge.backends import native
        from pymerge.rules.ties import resolve_options
        import ctypes, random
        n, count = {millions} << 20, {count}
        raw = mmap.mmap(-1, 2 * n)
        raw.write(random.Random(0).randbytes(n) * 2)
        words = memoryview(raw).cast("H")
        address = ctypes.addressof(ctypes.c_char.from_buffer(raw))
        out = mmap.mmap(-1, 2 * n)
        out.write(bytes(2 * n))
        target = ctypes.addressof(ctypes.c_char.from_buffer(out))
        rule = resolve_options(count, trim="magnitude", scope="tensor").rule(n - 64)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        models = [(address + 2 * k, "float16") for k in range(count)]
        faults = []
        for _ in range(3):
            native.ties(models, None, (target, "float16"), n - 64, rule, 4)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(after - before, faults[2] - faults[1])
        """)
    grown, faults = map(int, out.split())
    assert grown < 64 << 10, f"{grown} KB"
    assert faults < 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_memory_of_any_alignment(level, dtype):
    """Mapped files put tensors at any byte."""
    n = 4099
    models, base = family(n, 3, "gaussian", [dtype])
    rule = resolve_options(3).rule(n)
    want, wanted = expected(models, base, rule)
    size = n * dtype.itemsize
    for shift in (1, 3, 2, 6, 60):
        held = []

        def moved(tensor, shift=shift, held=held):
            raw = ctypes.create_string_buffer(size + 128)
            held.append(raw)
            start = ctypes.addressof(raw)
            start += -start % 64 + shift
            ctypes.memmove(start, tensor.data_ptr(), size)
            return start, NAMES[dtype]

        out = moved(torch.full_like(base, math.nan))
        stats = native.ties([moved(m) for m in models], moved(base), out, n, rule, 1)
        got = torch.empty_like(want)
        ctypes.memmove(got.data_ptr(), out[0], size)
        assert same_bits(got, want) and stats == wanted


def test_nothing_outside_out_is_written(level):
    for n in (1, 15, 33, 2047, 5000, ONE_PASS + 3):
        for dtype in (torch.float32, torch.bfloat16):
            models, base = family(n, 2, dtypes=[dtype])
            whole = torch.full((n + 80,), 7.0, dtype=dtype)
            for shift in (0, 5, 40):
                whole.fill_(7.0)
                run(
                    models,
                    base,
                    resolve_options(2).rule(n),
                    out=whole[shift : shift + n],
                    threads=2,
                )
                assert (whole[:shift] == 7).all() and (whole[shift + n :] == 7).all()


# --- sizes around vectors, blocks and tasks
# ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_around_vectors_blocks_and_tasks(level, dtype):
    sizes = [
        *range(0, 70),
        1023,
        1024,
        1025,
        2047,
        2048,
        2049,
        2080,
        131071,
        131072,
        131073,
        131104,
        131136 + 31,
    ]
    for n in sizes:
        models, base = family(n, 3, "few_values", [dtype], seed=n)
        check(models, base, resolve_options(3).rule(n), threads=2)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64, 70])
def test_numbers_of_models(level, count):
    for dtype in (torch.float32, torch.bfloat16):
        models, base = family(3001, count, "heavy_tailed", [dtype])
        for weights in (None, [0.5 + 0.1 * k for k in range(count)]):
            for options in (
                {"flavor": "mergekit"},
                {"flavor": "peft"},
                {"elect": "none", "merge": "sum"},
            ):
                check(models, base, resolve_options(count, weights=weights, **options).rule(3001))


def reserve(size, piece=None):
    """The address of `size` bytes of zeros, of which only what is written takes memory; with a
    piece, its middle is one piece of memory again and again.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    access, fixed, no_reserve = mmap.PROT_READ | mmap.PROT_WRITE, 0x10, 0x4000
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    address = libc.mmap(None, size, access, private, -1, 0)
    assert address not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    if piece is not None:
        file = os.memfd_create("middle")
        os.ftruncate(file, piece)
        for at in range(piece, size - 2 * piece, piece):
            got = libc.mmap(address + at, piece, access, mmap.MAP_SHARED | fixed, file, 0)
            assert got == address + at
        os.close(file)
    return address


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="maps memory by Linux's flags")
@pytest.mark.parametrize("trim", ["none", "magnitude"])
def test_beyond_two_to_the_thirty_two_elements(trim):
    """In 200 MB: all but a few inputs are the page of zeros, and what is written between the ends
    is written over.
    """
    n, piece = (1 << 32) + (1 << 20) + 7, 64 << 20
    size = -(-2 * n // piece) * piece
    model, out = reserve(size), reserve(size, piece)

    def words(address, first, count):
        return np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(address + 2 * first))

    middle = 1 << 32
    places = [
        *range(0, 100, 3),
        *range(middle - 50, middle + 50, 3),
        *range(middle, n, 9_973),
        n - 1,
    ]
    values = [0x3F80 + j | (j & 1) << 15 for j in range(len(places))]  # of increasing magnitude
    for place, value in zip(places, values, strict=True):
        words(model, place, 1)[0] = value
    rank = len(places) // 3
    rule = resolve_options(1, trim=trim).rule(n)
    rule = type(rule)(**{**rule.__dict__, "ranks": (rank,)})
    stats = native.ties([(model, "bfloat16")], None, (out, "bfloat16"), n, rule, 2)
    assert stats.kept == ((n if trim == "none" else rank),)
    first_kept = 0 if trim == "none" else len(places) - rank
    for begin, end in ((0, 1 << 20), (middle - (1 << 20), n)):
        want = np.zeros(end - begin, np.uint16)
        for place, value in list(zip(places, values, strict=True))[first_kept:]:
            if begin <= place < end:
                want[place - begin] = value
        assert np.array_equal(words(out, begin, end - begin), want)


# --- how the thresholds are found
# ------------------------------------------------------------------------------------


@best_level_first
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, "ulp"])
def test_large_tensors_of_adversarial_distributions(level, distribution, dtype):
    n = ONE_PASS + 12_345
    for count, density in ((2, 0.2), (5, [0.01, 0.2, 0.5, 0.97, 1.0])):
        if distribution == "ulp":
            models, base = ulp_family(n, count, dtype)
        else:
            models, base = family(n, count, distribution, [dtype])
        rule = resolve_options(count, density=density).rule(n)
        stats = check(models, base, rule, threads=2)
        assert all(
            t == (0 if r >= n else sorted_threshold(m, base, r))
            for m, r, t in zip(models, rule.ranks, stats.thresholds, strict=True)
        )


def sorted_threshold(model, base, rank):
    sizes = np.abs(model.float().numpy() - base.float().numpy())
    return float(np.partition(sizes, len(sizes) - rank)[len(sizes) - rank])


def atoms(n, shares, seed=0):
    """n magnitudes of which shares[j] are j + 1, shuffled, with random signs."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.repeat_interleave(torch.arange(1.0, len(shares) + 1), torch.tensor(shares))
    sizes = torch.cat([sizes, torch.zeros(n - len(sizes))])[torch.randperm(n, generator=g)]
    return sizes * torch.randint(0, 2, (n,), generator=g).mul(2).sub(1)


def test_ranks_at_the_edges_of_heavy_keys_take_a_second_pass(monkeypatch):
    """Near an edge the sample cannot say which key it is: the counts must, whichever is tried
    first.
    """
    n = ONE_PASS
    half = n // 2
    taken = set()
    for dtype in (torch.float32, torch.bfloat16):
        model = atoms(n, [half // 2, half // 2, half // 2]).to(dtype)
        base = torch.zeros(n, dtype=dtype)
        top = half // 2
        for rank in (top - 1, top, top + 1, 2 * top, 2 * top + 1, 3 * top, 3 * top + 1, n - 1):
            rule = resolve_options(1).rule(n)
            rule = type(rule)(**{**rule.__dict__, "ranks": (rank,)})
            stats = check([model], base, rule, threads=2)
            assert stats.thresholds == (max(0, 3 - (rank - 1) // top),)
            taken.add(path([model], base, rule))
    assert taken == {"one pass", "two passes"}


@best_level_first
@pytest.mark.parametrize("spread", [1e-3, 3e-4])
@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 3))])
def test_heavy_keys_among_others_take_one_pass(level, spread, seed):
    """bf16 task vectors have keys of some percent each and many light ones between: brackets are
    parted at the heavy ones, and where a stage says that it went by the wrong part, the others take
    another.
    """
    n = (1 << 20) + 77
    g = torch.Generator().manual_seed(seed)
    weights = 0.03 * torch.randn(n, generator=g)
    tuned = [weights + spread * torch.randn(n, generator=g) for _ in range(3)]
    models, base = [m.bfloat16() for m in tuned], weights.bfloat16()
    for densities in ([0.2, 0.2, 0.2], [0.05, 0.5, 0.35]):
        rule = resolve_options(3, density=densities).rule(n)
        assert path(models, base, rule) == "one pass", densities
        check(models, base, rule, threads=2)
    models[1][[5, n // 3, n - 1]] = math.inf  # such blocks are merged by the scalar rule
    models[2][n // 2] = math.nan
    check(models, base, rule, threads=3)


def test_later_stages_count_the_heavy_keys_that_their_lists_cannot_hold():
    """400 keys of a quarter percent each and more: the sample's bracket of two or three of them is
    collected in the first stage, but all stages of so many models have no room for that.
    """
    n, count = 1 << 22, 16
    g = torch.Generator().manual_seed(400)
    sizes = torch.randint(1, 401, (n,), generator=g)
    model = sizes.mul(torch.randint(0, 2, (n,), generator=g).mul(2).sub(1)).bfloat16()
    base = torch.zeros(n, dtype=torch.bfloat16)
    for density in (0.1512, 0.2506, 0.3006):
        rule = resolve_options(count, density=density).rule(n)
        # One thread: of two, one may get to do so much more that its list overflows.
        assert path([model] * count, base, rule, 1) == "one pass"
    stats = check([model] * count, base, rule, threads=2)
    assert set(stats.thresholds) == {sorted_threshold(model, base, rule.ranks[0])}


def test_later_stages_go_on_with_distinct_keys_of_many_models():
    """The brackets of so many models, as the first stage leaves them, do not fit into the lists of
    the last ones, but no key is heavy, and the stages between narrow them.
    """
    n, count = (1 << 22) + 5, 20
    g = torch.Generator().manual_seed(count)
    values = torch.randn(n + count, generator=g)
    models, base = [values[k : k + n] for k in range(count)], torch.zeros(n)
    rule = resolve_options(count, density=0.2).rule(n)
    assert path(models, base, rule, 1) == "one pass"
    _, stats = run(models, base, rule, threads=2)
    assert stats.thresholds == tuple(sorted_threshold(m, base, rule.ranks[0]) for m in models)


def test_stages_that_went_by_the_wrong_key_are_merged_again():
    """Ranks so near to the edges of heavy keys that a sample often says the wrong one, a stage the
    right one.
    """
    n = 1 << 20
    model = atoms(n, [n // 10, n // 10, n // 10]).bfloat16()
    base = torch.zeros(n, dtype=torch.bfloat16)
    for low in (-1500, -700, 700, 1500):
        for edge in (n // 10, n // 5):
            rule = resolve_options(1).rule(n)
            rule = type(rule)(**{**rule.__dict__, "ranks": (edge + low,)})
            stats = check([model], base, rule, threads=2)
            assert stats.thresholds == (3.0 - (edge + low - 1) // (n // 10),)
            assert path([model], base, rule) == "one pass"


@pytest.mark.parametrize(
    ("task", "unlike"),
    [
        (1 << 14, (7, 23, 31)),
        (1 << 15, range(3, 32, 8)),
        *(
            pytest.param(task, unlike, marks=pytest.mark.slow)
            for task, unlike in (
                (1 << 14, (15,)),
                (1 << 14, range(0, 32, 2)),
                (1 << 15, range(0, 32, 2)),
            )
        ),
    ],
)
def test_large_tensors_go_in_stages(task, unlike):
    """Some of each 32 tasks narrow the brackets of the next; where they are unlike the rest, the
    counts disprove it.
    """
    n = (513 if task == 1 << 14 else 65) * task + 7
    g = torch.Generator().manual_seed(5)
    base = torch.randn(n, generator=g)
    rule = resolve_options(2, density=[0.2, 0.6]).rule(n)
    even = [base + 1e-3 * torch.randn(n, generator=g) for _ in range(2)]
    scale = torch.ones(n // task + 1)
    for place in unlike:
        scale[place::32] = 1.01
    uneven = [base + scale.repeat_interleave(task)[:n] * (m - base) for m in even]
    assert path(even, base, rule) == "one pass"
    assert path(uneven, base, rule) == "two passes"
    check(uneven, base, rule, threads=2)
    even[0][12345] = even[1][3 * task + 5] = math.nan
    check(even, base, rule, threads=2)


def test_a_bracket_that_misses_is_found_out():
    """Elements that the sample never sees: one in 32 is sampled where, so spikes between them
    mislead it.
    """
    n = 1 << 20
    g = torch.Generator().manual_seed(3)
    for seed in range(3):
        model = torch.randn(n, generator=g)
        spikes = torch.randint(0, n // 8192, (60,), generator=g) * 8192
        for (
            start
        ) in spikes.tolist():  # whole stretches of large values: units are all in or all out
            model[start : start + 8192] *= 100
        base = torch.zeros(n)
        for density in (0.2, 0.37):
            rule = resolve_options(1, density=density, seed=seed).rule(n)
            stats = check([model], base, rule, threads=2)
            assert stats.thresholds == (sorted_threshold(model, base, rule.ranks[0]),)


@best_level_first
@pytest.mark.parametrize("n", [ONE_PASS - 1, ONE_PASS + 5, 600_000])
def test_neighbouring_keys_are_told_apart(level, n):
    """Every key from 1 on, once: whichever threshold was guessed, each element between it and the
    right one counts.
    """
    keys = torch.arange(n, dtype=torch.int32) + 0x3F800000
    g = torch.Generator().manual_seed(n)
    models = [keys[torch.randperm(n, generator=g)].view(torch.float32) for _ in range(2)]
    for densities in ([0.2, 0.5], [0.03, 0.9], [0.4, 0.6]):
        check(models, torch.zeros(n), resolve_options(2, density=densities).rule(n), threads=2)


def test_a_bracket_of_more_elements_than_there_is_room_for_is_found_out():
    """Those nearest to the threshold fill one task, which overflows the list of any of 128
    threads.
    """
    n = (1 << 24) - 1
    model = torch.rand(n, generator=torch.Generator().manual_seed(1))
    model[n // 2 : n // 2 + 8192] = torch.linspace(0.7999, 0.8001, 8192)
    rule = resolve_options(8).rule(n)
    rank = rule.ranks[0]
    base = torch.zeros(n)
    assert path([model] * 8, base, rule, 2) == "one pass"
    assert path([model] * 8, base, rule, 128) == "select"
    thresholds = (sorted_threshold(model, base, rank),) * 8
    want, wanted = run([model] * 8, base, rule.with_precomputed(thresholds=thresholds))
    got, stats = run([model] * 8, base, rule, threads=128)
    assert same_bits(got, want) and stats == wanted and stats.thresholds == thresholds


@pytest.mark.parametrize("threads", [64, 1024])
def test_threads_without_work_take_no_scratch(level, threads):
    n = ONE_PASS + 17
    models, base = family(n, 8)
    rule = resolve_options(8).rule(n)
    check(models, base, rule, threads=threads)
    assert path(models, base, rule, threads) == "one pass"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", [1984, 2000, 2016, 2047])
def test_last_blocks_that_are_almost_whole(level, tail, dtype):
    n = ONE_PASS + tail
    models, base = family(n, 2, dtypes=[dtype])
    check(models, base, resolve_options(2, density=[0.2, 0.5]).rule(n))


def test_paths_are_what_they_are_called(monkeypatch):
    monkeypatch.delenv("PYMERGE_CPU_LEVEL", raising=False)
    n = ONE_PASS
    models, base = family(n, 2)
    rule = resolve_options(2).rule(n)
    best = "one pass"
    assert path(models, base, rule) == best
    for options in (
        {"elect": "count"},
        {"merge": "max"},
        {"weights": [1, 2]},
        {"rescale": "density"},
    ):
        assert path(models, base, resolve_options(2, **options).rule(n)) == best
    mixed = [models[0].half(), models[1].bfloat16()]
    assert path(mixed, base, rule) == best
    assert path(models * 10, base, resolve_options(20).rule(n)) == best
    assert path(models * 11, base, resolve_options(22).rule(n)) == "select"
    assert path(models, base, resolve_options(2, trim="outliers").rule(n)) == "select"
    assert path(models, base, resolve_options(2, rescale="l1").rule(n)) == "select"
    assert path(models, base, rule.with_precomputed(thresholds=(0.1, 0.2))) == "precomputed"
    assert path([m[:5000] for m in models], base[:5000], resolve_options(2).rule(5000)) == "select"
    monkeypatch.setenv("PYMERGE_CPU_LEVEL", "portable")
    assert path(models, base, rule) == best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_elements_in_large_tensors(level, dtype):
    n = ONE_PASS + 999
    models, base = family(n, 4, dtypes=[dtype])
    rng = random.Random(5)
    for k, value in enumerate((math.nan, math.inf, -math.inf)):
        for _ in range(40):
            models[rng.choice((k, 3))][rng.randrange(n)] = value
    for options in ({}, {"density": 1e-5}, {"flavor": "paper", "density": 0.7}):
        rule = resolve_options(4, **{"scope": "tensor", **options}).rule(n)
        stats = check(models, base, rule, threads=2)
        assert sum(stats.non_finite) >= 100


def test_the_zero_sign_of_the_majority_is_found(level):
    n = ONE_PASS
    g = torch.Generator().manual_seed(1)
    a = torch.randint(-2, 2, (n,), generator=g).float()  # more negative than positive
    b = torch.randint(-1, 2, (n,), generator=g).float()
    for models in ([a, b], [-a, -b]):
        for base in (None, torch.zeros(n)):
            for elect in ("sum", "count"):
                rule = resolve_options(
                    2, flavor="paper", scope="tensor", elect=elect, density=0.9
                ).rule(n)
                check(models, base, rule, threads=2)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_means_by_count_are_divisions_rounded_once(level, count, step):
    """Every significand of fp32, or one in 97, over every small count, and subnormal numerators."""
    significands = torch.arange(1, 1 << 23, step, dtype=torch.int32)
    smallest = torch.full_like(significands, 1).view(
        torch.float32
    )  # adds to the count and not to the sum
    for exponent in (127, 3, 0):
        first = (significands + (exponent << 23)).view(torch.float32).clone()
        models = [first] + [smallest] * (count - 1)
        total = first.numpy().copy()
        for _ in range(count - 1):
            total = total + smallest.numpy()
        rule = resolve_options(count, density=1.0, flavor="peft").rule(first.numel())
        out, _ = run(models, None, rule, threads=2)
        assert np.array_equal(
            out.numpy().view(np.int32), (total / np.float32(count)).view(np.int32)
        )


# --- select
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_select_over_large_and_small_segments(level, dtype):
    n = 400_000
    models, base = family(n, 9, "blocks", [dtype])
    ranks = [1, 7, n // 5, n // 2, n - 1, n, 0, 3, n // 3]
    cuts = [0, 1, 40, 3000, 3001, 200_000, n]
    segments = [
        ([buffer(m[a:b]) for m in models], buffer(base[a:b]), b - a)
        for a, b in itertools.pairwise(cuts)
    ]
    want = reference.select([(models, base)], ranks)
    for threads in (1, 3):
        for tensors in (segments, [([buffer(m) for m in models], buffer(base), n)]):
            got = native.select(tensors, ranks, threads)
            assert all(
                a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(got, want, strict=True)
            )


def probed(n):
    """Which of up to 2^17 keys the selection looks at first (`nth_key`): one in each of 1024
    cells.
    """

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    cell = n // 1024
    return [j * cell + mix(j) % cell for j in range(1024)]


@pytest.mark.parametrize("n", [8193, 20_000, 131_072])
def test_select_where_the_keys_that_are_looked_at_first_mislead(level, n):
    g = torch.Generator().manual_seed(n)
    for shift in (-10, 10):  # the others lie below what was seen, or above
        x = torch.randn(n, generator=g)
        seen = torch.zeros(n, dtype=torch.bool)
        seen[probed(n)] = True
        x = torch.where(seen, x.abs() + 20, x.abs() + 20 + shift)
        ranks = [1, n // 9, n // 2, n - n // 9, n - 1]
        want = x.sort(descending=True).values[[rank - 1 for rank in ranks]].tolist()
        assert native.select([([buffer(x)] * 5, None, n)], ranks, 2) == want


def test_select_of_more_in_a_bracket_than_there_is_room_for():
    """Eight models at 64 threads leave room for 25,000 keys a list; some 45,000 are in one task."""
    n, task = 1 << 23, 1 << 17
    at, half = 50 * task + task // 2, 30_000
    x = torch.linspace(1, 2, n)
    far = torch.cat([x[: at - half], x[at + half :]])
    far = far[torch.randperm(len(far), generator=torch.Generator().manual_seed(1))]
    x = torch.cat([far[: at - half], x[at - half : at + half], far[at - half :]])
    want = float(x.sort().values[at])
    twice = 2 * x  # the list behind that of x
    models = [buffer(tensor) for tensor in [x, x, x, twice, x, x, x, x]]
    ranks = [0, 0, n - at, n - at, 0, 0, 0, 0]
    for threads in (2, 64):
        assert native.select([(models, None, n)], ranks, threads)[2:4] == [want, 2 * want]


def test_copy_writes_the_exclusive_or_of_its_sources(level):
    g = np.random.default_rng(0)
    arrays = [g.integers(0, 2**63, 1 << 17, dtype=np.int64) for _ in range(9)]
    raw = np.empty((1 << 17) + 8, dtype=np.int64)
    shift = (-raw.ctypes.data % 64) // 8
    out = raw[shift : shift + (1 << 17)]
    for count in (1, 3, 9):
        native.copy([a.ctypes.data for a in arrays[:count]], out.ctypes.data, out.nbytes, 2)
        assert np.array_equal(out, np.bitwise_xor.reduce(arrays[:count]))
    with pytest.raises(ValueError, match="one source or more"):
        native.copy([], out.ctypes.data, out.nbytes)
    with pytest.raises(ValueError, match="multiple of 64"):
        native.copy([arrays[0].ctypes.data], out.ctypes.data + 8, 64)


def test_stats_are_the_public_type():
    models, base = family(10, 1)
    assert isinstance(run(models, base, resolve_options(1).rule(10))[1], TiesStats)


LARGEST = {
    torch.float16: 65504.0,
    torch.bfloat16: 3.3895e38,
    torch.float32: 3.4028e38,
    torch.float64: 1.7e308,
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", LARGEST, ids=NAMES.get)
def test_count_non_finite(monkeypatch, level, dtype):
    monkeypatch.setenv("PYMERGE_CPU_LEVEL", level)
    generator = torch.Generator().manual_seed(3)
    for n in (0, 1, 63, 64, 1001, 32769, 300_001, 1_200_000):
        x = torch.randn(n + 1, generator=generator).to(dtype)[1:]  # on no boundary
        if n:
            x[torch.randint(n, (n // 7 + 1,), generator=generator)] = float("nan")
            x[-1], x[n // 2], x[n // 3] = float("inf"), float("-inf"), LARGEST[dtype]
        wanted = n - int(x.isfinite().sum())
        for threads in (1, 2, 3):
            assert native.count_non_finite(buffer(x), n, threads) == wanted
    every = torch.full((100_000,), float("inf"), dtype=dtype)
    assert native.count_non_finite(buffer(every), 100_000) == 100_000


@pytest.mark.parametrize("seed", range(3000, 3030))
def test_drawn_merges(monkeypatch, seed):
    """Any options, dtypes and numbers of models, values that are not finite, memory on no boundary,
    sizes about the loops' steps.
    """
    sizes = [1, 5, 63, 64, 65, 127, 777, 2049, 5001]
    counts = [1, 2, 3, 4, 5, 8, 9, 17, 33, 70]
    for case in (draw(seed, sizes, counts, doubles=False), draw_alike(seed, sizes)):
        for level in LEVELS:
            monkeypatch.setenv("PYMERGE_CPU_LEVEL", level)
            found, _ = differences(case, cpu.ties, "cpu")
            assert not found, (level, found, case.about, case.options)


@pytest.mark.parametrize("first", [0, 2**34 - 2**10 - 96, 2**34 - 32, 2**40])
def test_random_words_far_into_a_tensor(level, first):
    """About the element where the counter's high word begins to count."""
    n = 4099
    models, base = family(n, 3, dtypes=[torch.float32, torch.bfloat16])
    for rescale in ("none", "l1"):
        options = {"trim": "random", "rescale": rescale, "density": [0.3, 0.5, 1.0], "seed": 7}
        rule = resolve_options(3, **options).rule(n)
        check(models, base, rule.with_precomputed(first=first, factors=(1.5, 2.0, 1.0)), threads=2)


@pytest.mark.parametrize("row", [516, 700, 701])
def test_random_words_of_rows_far_into_a_tensor(level, row):
    """The same element, in a row whose words are drawn together."""
    rows, first = 9, (2**34 // (4 * row) - 1) * 4 * row
    models, base = family(rows * row, 2, dtypes=[torch.float32, torch.bfloat16])
    options = resolve_options(2, trim="magprune", density=[0.4, 0.6], epsilon=0.3, seed=7)
    rule = options.rule(rows * row, "w", (rows, row))
    for start in (0, first):
        check(models, base, rule.with_precomputed(first=start), threads=2)


@pytest.mark.parametrize("shift", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("rescale", ["density", "l1"])
def test_random_words_where_blocks_begin_anywhere(level, rescale, shift):
    """Whole blocks begin where a cache line of the output does, drawn words at every fourth
    element, what is kept of them at every 64th.
    """
    n = 9001
    models, base = family(n, 2)
    rule = resolve_options(2, trim="random", rescale=rescale, density=0.4, seed=5).rule(n)
    out = torch.full((n + 32,), math.nan)[shift : shift + n]
    got, stats = run(models, base, rule, out=out, threads=2)
    want, wanted = expected(models, base, rule)
    assert same_bits(got, want) and stats == wanted


def test_the_first_of_equal_products_is_the_largest(level):
    models = [torch.full((200,), 2.0), torch.full((200,), 1.0), torch.full((200,), -1.0)]
    for elect in ("sum", "none"):
        options = {"flavor": "peft", "trim": "none", "merge": "max", "elect": elect}
        rule = resolve_options(3, weights=[1.0, -2.0, 2.0], **options).rule(200)
        check(models, None, rule)


def test_a_factor_that_overflows_makes_zeros_nan(level):
    options = {"rescale": "l1", "density": 0.5, "elect": "none", "merge": "sum"}
    rule = resolve_options(1, **options).rule(300)
    known = rule.with_precomputed(thresholds=(0.0,), factors=(math.inf,))
    check([torch.zeros(300)], None, known)
    assert run([torch.zeros(300)], None, known)[0].isnan().all()


@pytest.mark.parametrize("options", MERGES.values(), ids=MERGES)
def test_merges_of_large_tensors(monkeypatch, options):
    """Thresholds that are found while merging, in each of the merges and dtypes."""
    n = (1 << 16) + 777
    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    for count, dtypes in ((3, [half]), (12, [single, brain]), (4, [brain])):
        models, base = family(n, count, "blocks", dtypes)
        rule = resolve_options(count, **options).rule(n)
        want, wanted = expected(models, base, rule)
        for level in LEVELS:
            monkeypatch.setenv("PYMERGE_CPU_LEVEL", level)
            got, stats = run(models, base, rule, threads=2)
            assert same_bits(got, want) and stats == wanted, level


@pytest.mark.parametrize("level", LEVELS)
def test_tensors_in_parts(monkeypatch, level):
    """What `known` finds makes the parts of a tensor have the bits of the whole, here and in the
    reference.
    """
    monkeypatch.setenv("PYMERGE_CPU_LEVEL", level)
    for seed in range(2000, 2020):
        case = draw(seed, [1, 5, 777, 9001, 20_001], [1, 2, 3, 9])
        for ties in (cpu.ties, reference.ties):
            assert not parts_differ(case, ties, 5000 + 4 * (seed % 3)), seed
