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
WHOLE_MERGES = [f"tests/test_{name}.py" for name in ("basic_merges", "tokenizer", "chat_template")]
# Where the drop-in says otherwise on purpose: an error in its own words, and without `dtype` the
# first model's dtype instead of the widest (docs/configuration.md).
DIFFERENT = "not test_mismatched_vocabulary_requires_alignment and not precisions[None-None]"
# package -> runs: arguments of pytest, and whether mergekit's merges are pymerge's `run_merge`, not
# mergekit's own under the patch.
RUNS: dict[str, list[tuple[list[str], bool]]] = {
    "peft": [
        (
            [
                "tests/test_custom_models.py",
                "-k",
                "(weighted or merging_adapters) and not seq_cls_mixed_modules",
            ],
            False,
        ),
        ([str(HERE / "adapters.py")], False),
    ],
    "mergekit": [
        (["tests"], False),
        ([*WHOLE_MERGES, "tests/test_merge_dtypes.py", "-k", DIFFERENT], True),
    ],
}


def sources(package: str) -> Path:
    """The unpacked source distribution of the installed version."""
    version = importlib.metadata.version(package)
    folder = BUILD / f"{package}-{version}"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
        subprocess.run([*pip, package, f"{package}=={version}", "--dest", str(BUILD)], check=True)
        with tarfile.open(BUILD / f"{folder.name}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
    (folder / "tests" / "__init__.py").touch()  # peft's tests import each other
    return folder


def main() -> int:
    status = 0
    BUILD.mkdir(parents=True, exist_ok=True)
    settings = BUILD / "pytest.ini"  # instead of theirs
    settings.write_text("[pytest]\n", encoding="utf-8")
    for package, runs in RUNS.items():
        folder = sources(package)
        path = os.pathsep.join(map(str, (folder, HERE, HERE.parent)))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        for arguments, drop_in in runs:
            own = environment | ({"UPSTREAM_DROP_IN": "1"} if drop_in else {})
            command = [sys.executable, "-m", "pytest", "-q", "-c", str(settings), "--rootdir=."]
            command += ["-p", "patched", "-p", "no:cacheprovider", *arguments]
            status |= subprocess.run(command, cwd=folder, env=own).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
