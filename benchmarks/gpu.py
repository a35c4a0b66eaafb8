"""The check of a GPU: build with CUDA, `pytest -m gpu`, `pymerge bench --device cuda`.

    make gpu OUT=folder
    python benchmarks/gpu.py --out folder [--minutes 8] [--only build,tests,speed,mats]

Needs torch with CUDA and what comes with it, triton, nvcc with a C++ compiler, pybind11, pytest,
numpy, click and rich; tests of what else is missing are left out and said. Nothing is downloaded and
the package need not be installed. Everything runs in processes with a share of the time, which leave
what they had where they crash or are ended; a test that takes its process with it is a failure, and
the tests behind it run in a new one. Too little time is no failure: what is missing is said. Writes
check.json, speed.csv and check.log after every step. Exits with 0 where all was right, 1 where not
(a bar that is missed is marked), 2 where there is no GPU. COMMIT names the commit of a tree without
its history.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_tests import begun, ended, outcomes, share, use_tree

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {
    "build": 0.0,
    "tests": 4.0,
    "speed": 3.0,
    "mats": 0.5,
}  # shares of what the build leaves
MOST, MEMORY_EACH = 8, 4 << 30  # processes that share the tests, and GPU memory for each
FAMILIES = ("fp32", "bf16-spread", "bf16-ulps", "fp16")
SIZES = ("64M", "16M")
KNOWN_BAR, WHOLE_BAR = 90.0, {"2": 70.0, "4": 70.0, "8": 60.0}  # percent of the copy, at 2^26
BARRED = ("fp32", "bf16-spread")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-check"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--share", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--bench", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--script", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if set(given.only) - set(SECTIONS):
        parser.error(f"--only {','.join(given.only)}: sections are {','.join(SECTIONS)}")
    use_tree()
    if given.share:
        number, count, seconds, log = given.share
        return share(int(number), int(count), float(seconds), Path(log))
    if given.bench is not None:
        from pymerge import bench

        return int(bench.main(given.bench) or 0)
    if given.script:
        sys.argv = given.script
        runpy.run_path(given.script[0], run_name="__main__")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu: no CUDA device is visible to torch; nothing was checked")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what is running, too
    return Check(given.out.resolve(), 60 * given.minutes).run(given.only)


class Check:
    """What was found so far, and the time that is left."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.end, self.seconds = out, time.monotonic() + seconds, seconds
        self.report: dict[str, Any] = {
            "machine": {},
            "sections": {},
            "failures": [],
            "left out": [],
        }
        self.rows: list[dict[str, str]] = []
        out.mkdir(parents=True, exist_ok=True)
        (out / "check.log").write_text("")

    def run(self, only: list[str]) -> int:
        whole = sum(SECTIONS[name] for name in only)
        for name in only:
            begin = time.monotonic()
            left = self.end - begin
            seconds = (
                max(20.0, left * SECTIONS[name] / whole) if SECTIONS[name] else self.seconds / 2
            )
            whole -= SECTIONS[name]
            print(f"{name}, at most {seconds:.0f} s", flush=True)
            found = getattr(self, name)(time.monotonic() + seconds)
            self.report["sections"][name] = {**found, "seconds": round(time.monotonic() - begin, 1)}
            self.write()
            print(f"  {self.report['sections'][name]}", flush=True)
        for row in self.rows:
            bar = f"bar {row['bar']}: {row['met']}" if row["bar"] else ""
            print(" ".join(row[k].rjust(12) for k in ("backend", "op", "family", "models", "n", "ms_p50", "percent_of_copy")), bar)  # fmt: skip
        for line in self.report["left out"]:
            print(f"left out: {line}")
        for line in self.report["failures"]:
            print(f"FAILED {line[:800]}")
        print("all was right" if not self.report["failures"] else f"{len(self.report['failures'])} failures")  # fmt: skip
        return 1 if self.report["failures"] else 0

    def write(self) -> None:
        (self.out / "check.json").write_text(json.dumps(self.report, indent=1) + "\n")
        with (self.out / "speed.csv").open("w", newline="") as handle:
            columns = list(dict.fromkeys(column for row in self.rows for column in row))
            writer = csv.DictWriter(handle, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        with (self.out / "check.log").open("ab") as log:
            log.write(f"--- {' '.join(command[1:])[:300]}\n".encode())
            log.flush()
            env = {**os.environ, "PYTHONUNBUFFERED": "1", **options.pop("env", {})}
            return subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=env, **options
            )

    def build(self, end: float) -> dict[str, Any]:
        """`setup.py build_ext` into this tree, for this device; run in the folder of the results, as
        setuptools would read the tree's pyproject.toml, which takes a newer one than torch's.
        """
        import torch

        arch = "".join(map(str, torch.cuda.get_device_capability(0)))
        env = {"PYMERGE_CUDA": "1", "PYMERGE_CUDA_ARCHS": arch}
        command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", str(ROOT)]
        code = wait(self.start(command, env=env, cwd=self.out), end)
        if code:
            self.report["failures"].append(f"build: ended with {code}, see check.log")
        self.report["machine"] = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
        return {"arch": f"sm_{arch}", "status": code}

    def tests(self, end: float) -> dict[str, Any]:
        import torch

        free, cores = torch.cuda.mem_get_info()[0], os.cpu_count() or 1
        count = max(1, min(MOST, cores // 2, free // MEMORY_EACH))
        logs = [self.out / f"tests-{number}.jsonl" for number in range(count)]
        running: dict[int, Any] = {}
        seen: dict[int, set[str]] = {}  # tests that had begun when a process crashed
        for number, log in enumerate(logs):
            log.unlink(missing_ok=True)
            running[number] = self.start(self.share_command(number, count, end, log))
        while running:
            for number, process in list(running.items()):
                if process.poll() is None and time.monotonic() < end + 20:
                    continue
                late = process.poll() is None
                code = wait(process, 0.0)
                del running[number]
                if late:
                    ended(logs[number])
                elif code and time.monotonic() < end - 10:
                    if seen.get(number, set()) == begun(logs[number]):  # not a single test further
                        self.report["failures"].append(f"tests: a process ended with {code}")
                        continue
                    seen[number] = begun(logs[number])
                    command = self.share_command(number, count, end, logs[number])
                    running[number] = self.start(command)
            time.sleep(0.2)
        found, failures, left_out = outcomes(logs)
        for log in logs:
            log.unlink(missing_ok=True)
        self.report["failures"] += failures
        self.report["left out"] += [f"tests: {line}" for line in left_out]
        return {"passed": list(found.values()).count("passed"), "processes": count}

    def share_command(self, number: int, count: int, end: float, log: Path) -> list[str]:
        left = max(0.0, end - time.monotonic())
        return [
            sys.executable,
            __file__,
            "--share",
            str(number),
            str(count),
            f"{left:.0f}",
            str(log),
        ]

    def speed(self, end: float) -> dict[str, Any]:
        for size in SIZES:
            for family in FAMILIES:
                for backend in ("cuda", "triton"):
                    what = f"{backend} {family} {size}"
                    if time.monotonic() > end - 5:
                        self.report["left out"].append(f"speed: {what}")
                        continue
                    name = self.out / "bench"
                    command = ["--device", "cuda", "--backend", backend, "--family", family]
                    command += ["--size", size, "--models", "2,4,8", "--out", str(name)]
                    process = self.start([sys.executable, __file__, "--bench", *command])
                    code = wait(process, end)
                    if code == 124:
                        self.report["left out"].append(f"speed: {what} did not end in time")
                    elif code:
                        self.report["failures"].append(f"speed: {what} ended with {code}, see check.log")  # fmt: skip
                    else:
                        self.take(name)
                    self.write()
        judged = [row["met"] for row in self.rows if row["bar"]]
        return {"rows": len(self.rows), "bars met": f"{judged.count('yes')} of {len(judged)}"}

    def take(self, name: Path) -> None:
        """The rows of a run that are not there yet, with their bars."""
        with name.with_suffix(".csv").open() as handle:
            for row in csv.DictReader(handle):
                bar = 0.0
                if row["n"] == str(1 << 26) and row["family"] in BARRED:
                    whole = WHOLE_BAR[row["models"]]
                    bar = {"thresholds known": KNOWN_BAR, "ties": whole}.get(row["op"], 0.0)
                row["bar"] = f"{bar:.0f}" if bar else ""
                row["met"] = (
                    ("yes" if float(row["percent_of_copy"]) >= bar else "no") if bar else ""
                )
                keys = ("backend", "op", "merge", "family", "models", "n")
                if all(any(row[k] != old[k] for k in keys) for old in self.rows):
                    self.rows.append(row)
        self.report["machine"] = json.loads(name.with_suffix(".json").read_text())["machine"]
        for suffix in (".csv", ".json"):
            name.with_suffix(suffix).unlink()

    def mats(self, end: float) -> dict[str, Any]:
        """An iteration beside its products, in files of its own."""
        if importlib.util.find_spec("scipy") is None:
            self.report["left out"].append("mats: scipy is not installed")
            return {}
        script = str(ROOT / "benchmarks/bench_mats.py")
        command = [sys.executable, __file__, "--script", script, "--device", "cuda"]
        command += ["--only", "iteration", "--out", str(self.out / "mats")]
        code = wait(self.start(command), end)
        if code:
            kind = "left out" if code == 124 else "failures"
            self.report[kind].append(f"mats: ended with {code}, see check.log")
        return {"status": code}


def wait(process: subprocess.Popen[bytes], end: float) -> int:
    """Its exit status; 124 where it took longer, and was ended with all that it had started."""
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
