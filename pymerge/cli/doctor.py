"""The text of `pymerge doctor`, for bug reports: what is installed, and what can run on this
machine.

Nothing here raises; whatever cannot be determined is reported with its reason.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pymerge.bench import machine
from pymerge.messages.words import printable, shown

_LONG = 200  # characters of a value
# Variables of docs/environment.md that pymerge reads when it runs -> the function that raises for a
# bad value.
_VARIABLES = {
    "PYMERGE_BACKEND": "pymerge.backends.registry:check_variable",
    "PYMERGE_CPU_LEVEL": "pymerge.backends.native:cpu_level",
    "PYMERGE_IO": "pymerge.checkpoint.memory:forced_io",
    "PYMERGE_NUM_THREADS": "pymerge.backends.native:num_threads",
    "OMP_NUM_THREADS": "",  # torch reads it
    "TRITON_INTERPRET": "pymerge.backends.registry:check_interpreter",
}


@dataclass(frozen=True)
class Availability:
    """Whether `backend` runs `op` here. reason: why not; None where it does."""

    op: str
    backend: str
    reason: str | None


@dataclass(frozen=True)
class Diagnosis:
    """What `collect` found.

    versions: of pymerge, Python and the packages that it uses, None where one is not installed.
    cpu_levels: compiled instruction set levels -> usable here. cpu_level: the one in use, or why
        none is.
    threads: how many the kernels take by default. devices: the accelerators that torch sees.
    bad: of the variables, those with a value that is an error where it counts -> the error.
    to_install: (command, what needs it) for what is missing.
    """

    versions: Mapping[str, str | None]
    location: str
    system: str
    processor: str
    cpu_levels: Mapping[str, bool]
    cpu_level: str
    threads: str
    devices: tuple[str, ...]
    variables: Mapping[str, str]
    backends: tuple[Availability, ...]
    bad: Mapping[str, str] = field(default_factory=dict)
    to_install: tuple[tuple[str, str], ...] = ()

    def text(self) -> str:
        """The report as plain lines without colour, for reading and pasting."""
        rows = [(name, version or "not installed") for name, version in self.versions.items()]
        rows += [
            ("location", self.location),
            ("system", self.system),
            ("processor", self.processor),
        ]
        rows += [("cpu levels", self._levels()), ("threads", self.threads)]
        rows += [("accelerator", device) for device in self.devices or ("none that torch sees",)]
        rows += [
            (
                name,
                f"{value if len(value) <= _LONG else shown(value)} (environment)"
                + (f"; error: {self.bad[name]}" if name in self.bad else ""),
            )
            for name, value in self.variables.items()
        ]
        width = max(len(name) for name, _ in rows) + 2
        lines = [f"{name:<{width}}{value}" for name, value in rows]
        lines += ["", f"{'op':<18}{'backend':<12}status"]
        for entry in self.backends:
            status = "available" if entry.reason is None else f"not available: {entry.reason}"
            lines.append(f"{entry.op:<18}{entry.backend:<12}{status}")
        if self.to_install:
            lines += ["", "what could be installed, and for what"]
            lines += [f"  {command}  # {use}" for command, use in self.to_install]
        return printable("\n".join(lines))

    def _levels(self) -> str:
        if not self.cpu_levels:
            return self.cpu_level
        return ", ".join(
            level
            + (
                " (in use)"
                if level == self.cpu_level
                else ""
                if usable
                else " (not on this processor)"
            )
            for level, usable in self.cpu_levels.items()
        ) + ("" if self.cpu_level in self.cpu_levels else f"; {self.cpu_level}")


def collect() -> Diagnosis:
    """Examine the installation and the machine. Imports torch."""
    levels: Mapping[str, bool] = {}
    try:
        native = importlib.import_module("pymerge.backends.native")
        levels = native.cpu_levels()
        level, threads = _value_or_error(native.cpu_level), _value_or_error(native.num_threads)
    except (ImportError, RuntimeError, ValueError) as error:
        level, threads = f"none: {error}", "unknown: there are no kernels"
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    errors = {name: _error(_VARIABLES[name]) for name in variables}
    bad = {name: error for name, error in errors.items() if error is not None}
    return Diagnosis(
        versions=machine.versions(),
        location=str(Path(__file__).parents[1]),
        system=machine.system(),
        processor=f"{machine.processor()}, {machine.usable_cpus()} usable by this process",
        cpu_levels=levels,
        cpu_level=level,
        threads=threads,
        devices=_devices(),
        variables=variables,
        backends=_backends(bad.get("PYMERGE_CPU_LEVEL")),
        bad=bad,
        to_install=tuple(machine.to_install()),
    )


def _value_or_error(function: Callable[[], object]) -> str:
    try:
        return str(function())
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"


def _error(check: str) -> str | None:
    """The error that the function "module:name" raises for a bad variable."""
    module, _, name = check.partition(":")
    try:
        if module:
            getattr(importlib.import_module(module), name)()
    except ImportError:  # reported with the backends
        return None
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


# Op of the registry -> its name in the report.
_SHOWN = {
    "ties": "ties",
    "select": "select",
    "gram": "gram",
    "combine": "combine",
    "masked": "masked",
    "cg": "mats (cg)",
}


def _backends(bad_level: str | None) -> tuple[Availability, ...]:
    registry = importlib.import_module("pymerge.backends.registry")
    reasons = {backend: _reason(registry.why_not, backend) for backend in registry.BACKENDS}
    reasons["cpu"] = reasons["cpu"] or bad_level
    reasons["reference"] = reasons["reference"] or _without_torch()
    return tuple(
        Availability(shown, backend, reasons[backend])
        for op, shown in _SHOWN.items()
        for backend in registry.BACKENDS
        if backend in registry.TABLE[op]
    )


def _reason(why_not: Callable[[str], str | None], backend: str) -> str | None:
    try:
        return why_not(backend)
    except ImportError as error:
        return str(error)


def _without_torch() -> str | None:
    try:
        importlib.import_module("torch")
    except ImportError as error:
        return str(error)
    return None


def _devices() -> tuple[str, ...]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return (f"unknown, torch cannot be imported: {error}",)
    if not torch.cuda.is_available():
        return ()
    return tuple(
        f"{i}: {torch.cuda.get_device_name(i)}, "
        f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    )
