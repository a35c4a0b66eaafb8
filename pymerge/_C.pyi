from collections.abc import Sequence
from types import ModuleType

# (address, dtype code): 0 float32, 1 float16, 2 bfloat16, 3 float64
_Address = tuple[int, int]

with_cuda: bool
cuda: ModuleType  # Ties, Select, Cg; only where with_cuda: see pymerge/backends/cuda.py

def ties(
    models: Sequence[_Address],
    base: _Address | None,
    out: _Address,
    n: int,
    rule: dict[str, object],
    threads: int,
    level: str,
) -> tuple[tuple[int, ...], int, tuple[int, ...], tuple[float, ...], int, int, str]: ...
def ties_seconds(
    models: Sequence[_Address],
    base: _Address | None,
    out: _Address,
    n: int,
    rule: dict[str, object],
    repeats: int,
    level: str,
) -> float: ...
def precompute(
    models: Sequence[_Address],
    base: _Address | None,
    out_dtype: int,
    n: int,
    rule: dict[str, object],
    threads: int,
    level: str,
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]: ...
def select(
    tensors: Sequence[tuple[Sequence[_Address], _Address | None, int]],
    ranks: Sequence[int],
    threads: int,
    level: str,
) -> list[float]: ...
def masked(
    models: Sequence[_Address],
    base: _Address,
    out: _Address,
    n: int,
    rule: dict[str, object],
    threads: int,
    level: str,
) -> tuple[tuple[int, ...], int, tuple[int, ...]]: ...
def masked_nonzero(
    models: Sequence[_Address],
    base: _Address,
    n: int,
    rule: dict[str, object],
    threads: int,
    level: str,
) -> int: ...
def masked_energies(
    models: Sequence[_Address],
    base: _Address,
    n: int,
    rule: dict[str, object],
    threads: int,
    level: str,
) -> list[float]: ...
def masked_overlaps(
    models: Sequence[_Address],
    base: _Address,
    n: int,
    rule: dict[str, object],
    threads: int,
    level: str,
) -> list[tuple[int, int]]: ...
def masked_divergences(
    models: Sequence[_Address],
    base: _Address,
    n: int,
    rule: dict[str, object],
    exact: bool,
    out: int,
    threads: int,
    level: str,
) -> float: ...
def masked_select(
    models: Sequence[_Address],
    base: _Address,
    n: int,
    rule: dict[str, object],
    ranks: Sequence[int],
    threads: int,
    level: str,
) -> list[float]: ...
def copy(sources: Sequence[int], out: int, bytes: int, threads: int, level: str) -> None: ...
def count_non_finite(tensor: _Address, n: int, threads: int, level: str) -> int: ...
def gram(
    models: Sequence[_Address],
    base: _Address | None,
    rows: int,
    columns: int,
    by_column: bool,
    out: int,
    threads: int,
    level: str,
) -> None: ...
def combine(
    models: Sequence[_Address],
    base: _Address | None,
    rows: int,
    columns: int,
    by_column: bool,
    coefficients: int,
    out: _Address,
    threads: int,
    level: str,
) -> None: ...
def add_low_rank(
    base: _Address,
    left: int,
    right: int,
    stride: int,
    rank: int,
    scale: float,
    out: _Address,
    rows: int,
    columns: int,
    level: str,
) -> None: ...
def cg_dot(
    x: int, y: int, layers: int, n: int, dtype: int, threads: int, level: str
) -> list[float]: ...
def cg_advance(
    step: int,
    r: int,
    p: int,
    q: int,
    alpha: Sequence[float],
    n: int,
    dtype: int,
    threads: int,
    level: str,
) -> list[tuple[float, float]]: ...
def cg_turn(
    p: int,
    z: int,
    step: int,
    beta: Sequence[float],
    n: int,
    dtype: int,
    threads: int,
    level: str,
) -> list[tuple[float, float]]: ...
def cpu_levels() -> list[tuple[str, bool]]: ...
def cpu_level(level: str) -> str: ...
def available_threads() -> int: ...
def watch_mapping(address: int, bytes: int) -> int: ...
def forget_mapping(handle: int) -> None: ...
def mapping_lost(handle: int) -> bool: ...
def lost_pages() -> int: ...
def install_bus_handler() -> None: ...
def remove_bus_handler() -> None: ...
def bus_handler_installed() -> bool: ...
def cuda_why_not() -> str | None: ...
