"""peft's and mergekit's own tests of merging, with the patches on (make nightly).

Their source distributions, of the versions installed here, are downloaded to build/upstream. What
needs the hub is left out by name.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "upstream"
RUNS = {
    "peft": [
        [
            "tests/test_custom_models.py",
            "-k",
            "(weighted or merging_adapters) and not seq_cls_mixed_modules",
        ],
        [str(HERE / "adapters.py")],
    ],
    # Its other tests need modules that the distribution lacks, or merge nothing.
    "mergekit": [
        [
            "tests/test_batched_merges.py",
            "tests/test_config_parameters.py",
            "tests/test_merge_method_interface.py",
            "tests/test_merge_method_regressions.py",
            "tests/test_sparsify.py",
        ]
    ],
}


def sources(package: str) -> Path:
    """The unpacked source distribution of the installed version."""
    version = importlib.metadata.version(package)
    folder = BUILD / f"{package}-{version}"
    if not folder.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
        subprocess.run([*pip, package, f"{package}=={version}", "--dest", str(BUILD)], check=True)
        with tarfile.open(BUILD / f"{folder.name}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
    (folder / "tests" / "__init__.py").touch()  # peft's tests import each other
    return folder


def main() -> int:
    status = 0
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    for package, runs in RUNS.items():
        folder = sources(package)
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{folder}{os.pathsep}{path}",
        }
        if package == "mergekit":  # its folder would hide the installed package
            environment["PYTHONPATH"] = path
        for arguments in runs:
            command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir=."]
            command += ["-p", "patched", "-p", "no:cacheprovider", *arguments]
            status |= subprocess.run(command, cwd=folder, env=environment).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
