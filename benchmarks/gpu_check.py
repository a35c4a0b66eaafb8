"""Everything that only a GPU can show: build with CUDA, the spec on the device, races, graphs, then speed.

    make gpu-check OUT=folder
    python benchmarks/gpu_check.py --out folder [--minutes 8] [--only build,cases,large,graph,sanitizer,speed]

Needs torch with CUDA, nvcc, a C++ compiler, pybind11, ninja and setuptools; nothing is downloaded. Each section has a
budget and ends on time; a section that fails does not stop the others. Writes check.json, speed.csv and build.log to the
folder and prints a short table last. Exits with 0 where all was right, 1 where not, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("build", "cases", "large", "graph", "sanitizer", "speed")
# Shares of the time, in minutes of eight. The build takes what it takes.
BUDGET = {"cases": 1.5, "large": 1.5, "graph": 0.4, "sanitizer": 1.0, "speed": 2.4}


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
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
    if arguments.part:
        return part(arguments.part, arguments.seconds)
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    report: dict[str, Any] = {"machine": describe(), "sections": {}, "failures": []}
    if "build" in arguments.only:
        report["sections"]["build"] = build(out)
        if not report["sections"]["build"]["ok"]:
            report["failures"].append("build: see build.log")
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
        "commit": first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "changed_files": len(
            output(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"]).splitlines()
        ),
    }


def build(out: Path) -> dict[str, Any]:
    """`setup.py build_ext --inplace` with the CUDA kernels for this device."""
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    log = out / "build.log"
    begin = time.monotonic()
    env = {**os.environ, "PYMERGE_CUDA": "1", "PYMERGE_CUDA_ARCHS": f"{major}{minor}"}
    with log.open("w") as handle:
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=ROOT,
            env=env,
            stdout=handle,
            stderr=handle,
        )
    seconds = round(time.monotonic() - begin, 1)
    print(f"build: {'done' if done.returncode == 0 else 'FAILED'} in {seconds} s", flush=True)
    if done.returncode != 0:
        print(log.read_text()[-4000:], flush=True)
    return {"ok": done.returncode == 0, "seconds": seconds, "arch": f"sm_{major}{minor}"}


def run_section(name: str, seconds: float, out: Path) -> dict[str, Any]:
    """One section in a process of its own, so that a fault on the device does not take the others with it."""
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
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 60
        )
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        code, text = 124, "".join(decoded(stream) for stream in (expired.stdout, expired.stderr))
    result: dict[str, Any] = {"failures": []}
    if result_file.exists():
        result = json.loads(result_file.read_text())
        result_file.unlink()
    if code != 0:
        result["failures"].append(f"the process ended with {code}: {text[-1500:]}")
    result["seconds"] = round(time.monotonic() - begin, 1)
    (out / f"{name}.log").write_text(text)
    for line in result["failures"][:5]:
        print(f"  {line[:600]}", flush=True)
    return result


def part(name: str, seconds: float) -> int:
    """Inside the section's process."""
    import gpu_correctness
    import gpu_speed

    out = parse().out.resolve()
    functions = {
        "cases": gpu_correctness.cases,
        "large": gpu_correctness.large,
        "graph": gpu_correctness.graph,
        "sanitizer": gpu_correctness.sanitizer,
        "sanitized": gpu_correctness.sanitized,
        "speed": lambda seconds: gpu_speed.speed(seconds, out / "speed.csv", describe()),
    }
    try:
        result = functions[name](seconds)
    except Exception:
        result = {"failures": [traceback.format_exc()[-3000:]]}
    if name == "sanitized":
        for line in result["failures"]:
            print(line)
        return 1 if result["failures"] else 0
    (out / f"{name}.part.json").write_text(json.dumps(result, default=str))
    return 0


def write(out: Path, report: dict[str, Any]) -> None:
    (out / "check.json").write_text(json.dumps(report, indent=1, default=str) + "\n")


def show(report: dict[str, Any]) -> None:
    """The short table, last."""
    machine = report["machine"]
    print(
        f"\n{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, triton {machine['triton']}, "
    )
    print(f"commit {machine['commit']}, {machine['date']}, {report['seconds']} s")
    for name, section in report["sections"].items():
        summary = section.get("summary") or {
            k: v for k, v in section.items() if k in ("ok", "arch")
        }
        print(f"  {name:10} {section.get('seconds', 0):6.1f} s  {summary}")
    speed = report["sections"].get("speed", {})
    if speed.get("rows"):
        print(f"  copy: {speed['copy_gb_per_s']:.0f} GB/s")
        print(f"  {'what':34} {'backend':10} {'ms':>9} {'GB/s':>7} {'% copy':>7}")
        for row in speed["rows"]:
            gb, percent = row.get("gb_per_s") or 0, row.get("percent_of_copy") or 0
            note = row.get("note") or ""
            print(
                f"  {row['what']:34} {row['backend']:10} {row['ms_p50']:9.4f} {gb:7.0f} {percent:7.1f} {note}"
            )
    for line in report["failures"]:
        print(f"FAILED {line[:800]}")
    print("all checks passed" if not report["failures"] else f"{len(report['failures'])} failures")


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


def decoded(stream: Any) -> str:
    return stream.decode(errors="replace") if isinstance(stream, bytes) else stream or ""


if __name__ == "__main__":
    sys.exit(main())
