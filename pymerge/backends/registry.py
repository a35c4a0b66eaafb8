"""Which backend runs an op: a table of op x backend -> function, loaded when first used.

"auto" takes the preferred backend of the tensors' device that is available, before any work. A
backend asked for by name runs or raises with the reason; nothing falls through to another one. The
environment variable PYMERGE_BACKEND replaces "auto".
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

from pymerge.messages.arguments import argument
from pymerge.messages.words import shown
from pymerge.rules import types

if TYPE_CHECKING:
    from pymerge.backends.cg.device import SmallKernel
    from pymerge.backends.cg.iteration import VectorUpdates

# Op -> backend -> "module:name" of what runs it.
TABLE = {
    # docs/spec/ties.md
    "ties": {
        "reference": "pymerge.reference.ties:ties",
        "cpu": "pymerge.backends.cpu:ties",
        "cuda": "pymerge.backends.cuda:ties",
        "triton": "pymerge.triton_kernels.ties:ties",
    },
    # Its trim "magprune" (T3).
    "magprune": {
        "reference": "pymerge.reference.ties:ties",
        "cpu": "pymerge.backends.cpu:ties",
    },
    # Any number of tensors in a handful of launches.
    "ties_many": {
        "cuda": "pymerge.backends.cuda:ties_many",
        "triton": "pymerge.triton_kernels.ties:ties_many",
    },
    "select": {
        "reference": "pymerge.reference.ties:select",
        "cpu": "pymerge.backends.cpu:select",
        "cuda": "pymerge.backends.cuda:select",
        "triton": "pymerge.triton_kernels.ties:select",
    },
    # docs/spec/masked.md
    "masked": {
        "reference": "pymerge.reference.masked:masked",
        "cpu": "pymerge.backends.cpu:masked",
    },
    # docs/spec/gram.md
    "gram": {
        "reference": "pymerge.reference.gram:gram",
        "cpu": "pymerge.backends.cpu:gram",
        "cuda": "pymerge.backends.cuda_gram:gram",
        "triton": "pymerge.triton_kernels.gram:gram",
    },
    "combine": {
        "reference": "pymerge.reference.gram:combine",
        "cpu": "pymerge.backends.cpu:combine",
        "cuda": "pymerge.backends.cuda_gram:combine",
        "triton": "pymerge.triton_kernels.gram:combine",
    },
    # docs/spec/mats.md, M6: a subclass of `VectorUpdates`.
    "cg": {
        "reference": "pymerge.backends.cg.iteration:VectorUpdates",
        "cpu": "pymerge.backends.cg.cpu:CpuUpdates",
        "cuda": "pymerge.backends.cg.cuda:CudaUpdates",
        "triton": "pymerge.triton_kernels.mats.cg:TritonUpdates",
    },
    # Layers that one block of threads solves whole.
    "cg_small": {
        "cuda": "pymerge.backends.cg.cuda:solve_small",
        "triton": "pymerge.triton_kernels.mats.cg_small:solve_small",
    },
}

# Device type -> backends in order of preference. Not measured on any GPU yet: "cuda" comes before
# "triton", as it launches sooner and compiles nothing at run time. Where `pymerge bench` on a GPU
# says otherwise, this line changes, with device, date and both times beside it.
ORDER = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}

BACKENDS = tuple(name for name in get_args(types.Backend) if name != "auto")


# What Triton reads as true, and as false.
_INTERPRET, _COMPILE = ("1", "true", "on", "yes", "y"), ("", "0", "false", "off", "no", "n")


def why_not(backend: str) -> str | None:
    """None where the backend can run on this machine, else the reason."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _why_not_triton()
    from pymerge.backends import native

    missing = native.why_not()
    if missing is not None or backend == "cpu":
        return missing
    return native.why_not_cuda()


def _why_not_triton() -> str | None:
    import torch

    try:
        check_interpreter()
    except ValueError as error:
        return str(error)
    if _interpreted():
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is visible to torch"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in _INTERPRET


def order(device: str) -> tuple[str, ...]:
    """Backends for a device type, in order of preference."""
    return ORDER.get(device, ("reference",))


def pick(op: str, device: str, backend: str = "auto") -> tuple[str, Callable[..., Any]]:
    """(name, function) of the backend that runs `op` on tensors of a device type.

    Errors are those of `choose`.
    """
    name = choose(device, backend)
    return name, load(op, name)


def pick_or_reference(
    op: str, device: str, backend: str = "auto", said: str = ""
) -> tuple[str, Callable[..., Any]]:
    """As `pick`, for an op that some backends lack: "auto" takes the reference in their place.

    said: the op in the words of the caller, for the RuntimeError on a backend that is asked for by
    name and lacks it.
    """
    name = choose(device, backend)
    if name not in TABLE[op]:
        if asked_for(backend) != "auto":
            have = " and ".join(repr(each) for each in TABLE[op])
            raise RuntimeError(
                f"backend {name!r} has no kernels for {said or op}; {have} have, on tensors on the"
                " CPU (.cpu())"
            )
        name = "reference"
    return name, load(op, name)


def choose(device: str, backend: str = "auto") -> str:
    """The backend for tensors of a device type.

    ValueError for an unknown backend or one that does not serve the device; RuntimeError, with the
    reason, for one that is not available here. Both speak of PYMERGE_BACKEND where that is what
    names it.
    """
    check_word(backend)
    asked = asked_for(backend)
    if asked == "auto":
        able = (name for name in order(device) if why_not(name) is None)
        return next(able, "reference")
    by_argument = backend != "auto"
    said = f"backend {shown(asked)}" if by_argument else f"PYMERGE_BACKEND={shown(asked)}"
    _check_available(asked, said)
    if not serves(asked, device):
        way_out = "pass backend='auto'" if by_argument else "unset it"
        raise ValueError(f"{said} does not take tensors on {device!r}; move them, or {way_out}")
    return asked


def check_word(value: object, said: str = "backend") -> None:
    """ValueError for what names no backend."""
    words = ("auto", *BACKENDS)
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{said}={shown(value)} is not one of {', '.join(map(repr, words))}")


def _check_available(asked: str, said: str) -> None:
    check_word(asked, "PYMERGE_BACKEND")
    reason = why_not(asked)
    if reason is not None:
        raise RuntimeError(f"{said} is not available: {reason}")


def check_variable() -> None:
    """ValueError or RuntimeError where PYMERGE_BACKEND names a backend that runs nothing here."""
    asked = asked_for()
    if asked != "auto":
        _check_available(asked, f"PYMERGE_BACKEND={shown(asked)}")


def check_interpreter() -> None:
    """ValueError where TRITON_INTERPRET has another value than those that Triton reads."""
    asked = os.environ.get("TRITON_INTERPRET", "")
    if asked.lower() not in (*_INTERPRET, *_COMPILE):
        raise ValueError(
            f"TRITON_INTERPRET={shown(asked)} is not 1 or 0; unset it, or set it to 1 for Triton's"
            " interpreter"
        )


def asked_for(backend: str = "auto") -> str:
    """The backend named by the argument, else by PYMERGE_BACKEND, else "auto"."""
    return backend if backend != "auto" else os.environ.get("PYMERGE_BACKEND") or "auto"


def check_folders() -> None:
    """ValueError where PYMERGE_BACKEND names a backend that cannot merge folders on any device."""
    on_gpu = [name for name in order("cuda") if name in TABLE["ties_many"]]
    asked = asked_for()
    if asked not in ("auto", "cpu", *on_gpu):
        raise ValueError(
            f"PYMERGE_BACKEND={shown(asked)} does not merge folders; 'cpu' does, and on a GPU"
            f" {' and '.join(map(repr, on_gpu))}, or unset it"
        )


def check_folders_on_cpu() -> None:
    """ValueError where PYMERGE_BACKEND names a backend that cannot merge folders on the CPU."""
    asked = asked_for()
    if asked not in ("auto", "cpu"):
        raise ValueError(
            f"PYMERGE_BACKEND={shown(asked)} does not merge folders on the CPU; 'cpu' does, or"
            " unset it"
            + (
                f" (on a GPU, {argument('device', 'cuda')}, {asked!r} does)"
                if asked in ORDER["cuda"] and asked != "reference"
                else ""
            )
        )


def pick_many() -> tuple[str, Callable[..., Any]]:
    """(name, `ties_many`) of the GPU backend that merges many tensors with one call.

    The preferred one that can run, or PYMERGE_BACKEND. RuntimeError with every reason where there
    is none, ValueError where PYMERGE_BACKEND names one that is not for a GPU.
    """
    able = [name for name in order("cuda") if name in TABLE["ties_many"]]
    asked = asked_for()
    if asked != "auto" and asked not in able:
        raise ValueError(
            f"PYMERGE_BACKEND={shown(asked)} does not merge folders on a GPU;"
            f" {' and '.join(able)} do, or unset it"
        )
    reasons = []
    for name in able if asked == "auto" else [asked]:
        reason = why_not(name)
        if reason is None:
            return name, load("ties_many", name)
        reasons.append(f"backend {name!r} is not available: {reason}")
    raise RuntimeError("; ".join(reasons))


def vector_updates(device: str, backend: str = "auto") -> type[VectorUpdates]:
    """The class of vector updates for tensors of a device type. Errors are those of `choose`."""
    found: Any = pick("cg", device, backend)[1]
    updates: type[VectorUpdates] = found
    return updates


def small_kernel(device: str, backend: str = "auto") -> SmallKernel | None:
    """The backend's kernel that solves small layers as a whole, or None."""
    chosen = choose(device, backend)
    if chosen == "cuda" and asked_for(backend) == "auto":
        # Triton's or none: the CUDA kernel is not chosen until it was measured against Triton's and
        # against separate launches.
        if why_not("triton") is not None or not serves("triton", device):
            return None
        chosen = "triton"
    return load("cg_small", chosen) if chosen in TABLE["cg_small"] else None


def serves(backend: str, device: str) -> bool:
    """Whether a backend accepts tensors of a device type."""
    if backend == "reference":
        return True
    if backend == "triton" and _interpreted():
        return device == "cpu"
    return backend in ORDER.get(device, ())


def load(op: str, backend: str) -> Callable[..., Any]:
    """The function or class of an op on a backend, imported on first use."""
    module, _, name = TABLE[op][backend].partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
