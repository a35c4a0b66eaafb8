"""Everything that only a GPU can show: build with CUDA, the spec on the device, races, graphs,
merges of folders, then speed.

    make gpu-check OUT=folder
    python benchmarks/gpu_check.py --out folder [--minutes 8] [--only build,compile,cases,spec,large,graph,engine,sanitizer,speed,mats]

Needs torch with CUDA and what comes with it (setuptools), triton, nvcc with a C++ compiler,
pybind11 and, for the spec suite, pytest; folders are merged where numpy and safetensors are, mats
is timed where numpy, scipy and click are. Nothing is downloaded and the package need not be
installed. Each section is a process of its own with a share of the time, ends on time, and leaves
what it had where it fails; the others go on. Writes check.json and speed.csv to the folder after
every section, what the sections print to check.log, and prints a short table last. Exits with 0
where all was right, 1 where not (a bar that is missed is not an error, but is marked), 2 where
there is no GPU. The environment's COMMIT names the commit for a tree that was copied without its
history.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("build", "compile", "cases", "spec", "large", "graph", "engine", "sanitizer", "speed", "mats")  # fmt: skip
# Shares of the time that the build leaves, which takes what it takes up to half of all.
BUDGET = {
    "compile": 0.7,
    "cases": 0.7,
    "spec": 0.8,
    "large": 1.0,
    "graph": 0.4,
    "engine": 0.8,
    "sanitizer": 0.8,
    "speed": 2.2,
    "mats": 0.6,
}
LOG = "check.log"
GRACE = 30  # seconds that a section may take beyond its share before it is ended


def main() -> int:
    arguments = parse()
    try:
        import torch
    except ImportError as error:
        print(f"gpu-check needs torch: {error}")
        return 2
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device is visible to torch; nothing was checked")
        return 2
    use_tree()
    if arguments.part:
        return part(arguments.part, arguments.seconds, arguments.out.resolve())
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / LOG).write_text("")
    # A time limit from outside ends the section at hand too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    report: dict[str, Any] = {"machine": describe(), "sections": {}, "failures": []}
    if "build" in arguments.only:
        report["sections"]["build"] = build(out, 30 * arguments.minutes)
        if not report["sections"]["build"]["ok"]:
            report["failures"].append(f"build: see {LOG}")
        write(out, report)
    whole = sum(BUDGET[name] for name in arguments.only if name in BUDGET)
    for name in arguments.only:
        if name == "build":
            continue
        seconds = max(
            15.0, (60 * arguments.minutes - (time.monotonic() - started)) * BUDGET[name] / whole
        )
        whole -= BUDGET[name]
        print(f"[{time.monotonic() - started:5.0f} s] {name}, at most {seconds:.0f} s", flush=True)
        report["sections"][name] = run_section(name, seconds, out)
        report["failures"] += [
            f"{name}: {line}" for line in report["sections"][name].get("failures", [])
        ]
        write(out, report)
    report["seconds"] = round(time.monotonic() - started, 1)
    write(out, report)
    show(report)
    return 1 if report["failures"] else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-check"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.only) - set(SECTIONS)
    if unknown:
        parser.error(f"--only {','.join(sorted(unknown))}: not among {','.join(SECTIONS)}")
    return arguments


def use_tree() -> None:
    """Have this tree imported, which need not be installed: the folder triton_kernels is
    pymerge.triton_kernels.
    """
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
    name, folder = "pymerge.triton_kernels", ROOT / "triton_kernels"
    import pymerge

    if importlib.util.find_spec(name) is None:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        vars(pymerge)["triton_kernels"] = module


def describe() -> dict[str, Any]:
    """Where and with what the numbers are made."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "torch": torch.__version__,
        "triton": version("triton"),
        "nvcc": first_line(["nvcc", "--version"], "release"),
        "python": sys.version.split()[0],
        "cpus": os.cpu_count(),
        "commit": (
            first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
            or os.environ.get("COMMIT")
        ),
        "changed_files": len(
            output(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"]).splitlines()
        ),
    }


def build(out: Path, seconds: float) -> dict[str, Any]:
    """`setup.py build_ext` into this tree, with the CUDA kernels for this device.

    Run in the folder of the results: in the tree's own, setuptools would read pyproject.toml, which
    takes version 77 and torch often comes with an older one.
    """
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    begin = time.monotonic()
    env = {**os.environ, "PYMERGE_CUDA": "1", "PYMERGE_CUDA_ARCHS": f"{major}{minor}"}
    command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", str(ROOT)]
    code, text = run_process("build", command, out, seconds, cwd=out, env=env)
    taken = round(time.monotonic() - begin, 1)
    print(f"build: {'done' if code == 0 else f'FAILED with {code}'} in {taken} s", flush=True)
    if code != 0:
        print(text[-4000:], flush=True)
    return {"ok": code == 0, "seconds": taken, "arch": f"sm_{major}{minor}"}


def run_section(name: str, seconds: float, out: Path) -> dict[str, Any]:
    """One section in a process of its own, so that a fault on the device does not take the others
    with it.
    """
    begin = time.monotonic()
    result_file = out / f"{name}.part.json"
    result_file.unlink(missing_ok=True)
    command = [
        sys.executable,
        __file__,
        "--part",
        name,
        "--seconds",
        f"{seconds:.0f}",
        "--out",
        str(out),
    ]
    # Unbuffered: what it has printed is there should it be ended.
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    code, text = run_process(name, command, out, seconds + GRACE, env=env)
    result: dict[str, Any] = {"failures": []}
    if result_file.exists():
        result = json.loads(result_file.read_text())
        result_file.unlink()
    if code != 0:
        why = "was ended after its time" if code == 124 else f"ended with {code}"
        result["failures"].append(f"the process {why}: {text[-1500:]}")
    result["seconds"] = round(time.monotonic() - begin, 1)
    for line in result["failures"][:5]:
        print(f"  {line[:600]}", flush=True)
    return result


def run_process(
    name: str, command: list[str], out: Path, seconds: float, **options: Any
) -> tuple[int, str]:
    """(exit status, what it printed, which goes to the log too); status 124 where it took longer
    and was ended, with all that it had started.
    """
    with (out / LOG).open("a+b") as log:
        log.write(f"--- {name}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            command, **{"cwd": ROOT, **options}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(begin)
        return code, log.read().decode(errors="replace")


def part(name: str, seconds: float, out: Path) -> int:
    """Inside the section's process. What a section has so far is kept in a file, should it not come
    to its end.
    """
    import gpu_compile
    import gpu_correctness
    import gpu_engine
    import gpu_mats
    import gpu_sanitizer
    import gpu_spec
    import gpu_speed

    result_file = out / f"{name}.part.json"

    def keep(result: dict[str, Any]) -> None:
        unfinished = result_file.with_suffix(".new")
        unfinished.write_text(json.dumps(result, default=str))
        unfinished.replace(result_file)

    section, *numbers = name.split("-")
    functions = {
        "compile": gpu_compile.compile_ahead,
        "cases": lambda seconds: gpu_correctness.cases(seconds, keep),
        "spec": lambda seconds: (
            gpu_spec.share(*map(int, numbers), seconds) if numbers else gpu_spec.spec(seconds)
        ),
        "large": lambda seconds: gpu_correctness.large(seconds, keep),
        "graph": lambda seconds: gpu_correctness.graph(seconds, keep),
        "sanitizer": gpu_sanitizer.sanitizer,
        "sanitized": gpu_sanitizer.sanitized,
        "engine": lambda seconds: gpu_engine.engine(seconds, keep),
        "speed": lambda seconds: gpu_speed.speed(seconds, keep),
        "mats": lambda seconds: gpu_mats.mats(seconds, keep),
    }
    try:
        result = functions[section](seconds)
    except Exception:
        result = json.loads(result_file.read_text()) if result_file.exists() else {"failures": []}
        result["failures"].append(traceback.format_exc()[-3000:])
    if name == "sanitized":
        for line in result["failures"]:
            print(line)
        return 1 if result["failures"] else 0
    keep(result)
    return 0


def write(out: Path, report: dict[str, Any]) -> None:
    (out / "check.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    write_table(out / "speed.csv", report)


def write_table(table: Path, report: dict[str, Any]) -> None:
    """Every row that any section measured, with where and with what."""
    columns = ["what", "backend", "ms_p20", "ms_p50", "ms_p80", "gb_per_s", "percent_of_copy", "bar", "met", "runs", "note"]  # fmt: skip
    copy = report["sections"].get("speed", {}).get("copy_gb_per_s", "")
    with table.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow([*columns, "copy_gb_per_s", *report["machine"]])
        for row in rows_of(report):
            values = [row.get(column, "") for column in columns] + [copy]
            values = [f"{v:.5g}" if isinstance(v, float) else v for v in values]
            writer.writerow([*values, *report["machine"].values()])


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for section in report["sections"].values() for row in section.get("rows", [])]


def show(report: dict[str, Any]) -> None:
    """The short table, last."""
    machine = report["machine"]
    print(
        f"\n{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, triton"
        f" {machine['triton']}, "
    )
    print(f"commit {machine['commit']}, {machine['date']}, {report['seconds']} s")
    for name, section in report["sections"].items():
        summary = section.get("summary") or {
            k: v for k, v in section.items() if k in ("ok", "arch")
        }
        print(f"  {name:10} {section.get('seconds', 0):6.1f} s  {summary}")
    speed = report["sections"].get("speed", {})
    if speed.get("copy_gb_per_s"):
        print(f"  copy: {speed['copy_gb_per_s']:.0f} GB/s")
    for title, bandwidth in report["sections"].get("engine", {}).get("bus_gb_per_s", {}).items():
        print(f"  bus {title}: {bandwidth:.1f} GB/s")
    rows = rows_of(report)
    if rows:
        print(f"  {'what':40} {'backend':13} {'ms':>10} {'GB/s':>7} {'% copy':>7}  bar")
    for row in rows:
        gb, percent = row.get("gb_per_s"), row.get("percent_of_copy")
        bar = f"{row['bar']}: {'met' if row['met'] else 'MISSED'}" if "bar" in row else ""
        print(
            f"  {row['what']:40} {row['backend']:13} {number(row.get('ms_p50'), 10, 4)}"
            f" {number(gb, 7, 0)} {number(percent, 7, 1)} "
            f" {'; '.join(text for text in (bar, row.get('note')) if text)}"
        )
    for line in report["failures"]:
        print(f"FAILED {line[:800]}")
    print("all checks passed" if not report["failures"] else f"{len(report['failures'])} failures")


def number(value: float | None, width: int, digits: int) -> str:
    return "-".rjust(width) if value is None else f"{value:{width}.{digits}f}"


def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def first_line(command: list[str], containing: str = "") -> str | None:
    return next((line.strip() for line in output(command).splitlines() if containing in line), None)


if __name__ == "__main__":
    sys.exit(main())
