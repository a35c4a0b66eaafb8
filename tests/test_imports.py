"""Which layer of the package may import from which, and what importing it costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The layers from the lowest to the highest: a module imports from its own layer and lower ones.
LAYERS = [
    "pymerge.errors",
    "pymerge.version",
    "pymerge.dtypes",
    "pymerge.interrupt",  # work that no interrupt can break off halfway
    "pymerge.messages",  # how errors speak of arguments and of many names
    "pymerge.rules",  # options resolved to plain data
    "pymerge.reference",  # what is right, in plain PyTorch
    "pymerge.backends",  # what runs an op
    "pymerge.triton_kernels",
    "pymerge.ops",  # the public ops: validate, choose the backend, call
    "pymerge.methods",  # merge methods in terms of ops
    "pymerge.checkpoint",  # model folders, read and written
    "pymerge.statistics",  # collected from a running model
    "pymerge.recipe",  # mergekit's YAML
    "pymerge.planning",  # from a recipe and headers to a list of output tensors
    "pymerge.engine",  # merging: folders and state dicts
    "pymerge.sweeps",  # merging with many settings
    "pymerge.analysis",  # what the models of a merge change, and what becomes of it
    "pymerge.compat",  # drop-ins for other tools' own functions
    "pymerge.bench",
    "pymerge.cli",
    "pymerge.__main__",
]
PACKAGES = {"pymerge": ROOT / "pymerge", "pymerge.triton_kernels": ROOT / "triton_kernels"}


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found[name] = path
    return found


def imports(path: Path, known: set[str]) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of this package's modules, inside of functions too.

    But for those that `pymerge` itself shows to type checkers: it names what is public, whatever
    the layer.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path == PACKAGES["pymerge"] / "__init__.py":
        tree.body = [
            node
            for node in tree.body
            if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inner]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
        else:
            continue
        for name in names:
            if name == "pymerge" or name.startswith("pymerge."):
                yield name, node.lineno


def layer(module: str) -> int:
    """The place of a module's layer in the list. The package itself says what is public and imports
    the release alone.
    """
    if module == "pymerge":
        module = "pymerge.version"
    if module == "pymerge._C":
        module = "pymerge.backends"
    for place, name in enumerate(LAYERS):
        if module == name or module.startswith(f"{name}."):
            return place
    raise AssertionError(
        f"{module} is in no layer; add its layer to LAYERS in {Path(__file__).name}"
    )


def test_every_module_has_a_layer():
    for module in modules():
        layer(module)


def test_every_layer_is_there():
    places = {layer(module) for module in modules()}
    assert [name for place, name in enumerate(LAYERS) if place not in places] == []


def test_imports_go_down():
    found = modules()
    known = {*found, "pymerge._C"}
    upward = [
        f"{path.relative_to(ROOT)}:{line}: {module} imports {target}, which is a higher layer"
        for module, path in found.items()
        for target, line in imports(path, known)
        if layer(target) > layer(module)
    ]
    assert not upward, "\n".join(upward)


def test_no_modules_import_each_other():
    """Not by way of others either, nor inside of functions."""
    found = modules()
    arrows = {
        module: {t for t, _ in imports(path, set(found)) if t in found and t != module}
        for module, path in found.items()
    }
    while leaves := [module for module, targets in arrows.items() if not targets]:
        for leaf in leaves:
            del arrows[leaf]
        for targets in arrows.values():
            targets.difference_update(leaves)
    assert not arrows, f"on a circle of imports, or above one: {', '.join(sorted(arrows))}"


def test_no_file_of_the_package_is_longer_than_500_lines():
    long = {
        str(path.relative_to(ROOT)): count
        for path in modules().values()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long


def test_kernels_include_no_other_ops():
    """csrc: common is the lowest layer, then a device's core, then a folder for each op; the
    bindings include any of them.
    """
    below = {("common",): set()}
    for device in ("cpu", "cuda"):
        below[device, "core"] = {("common",)}
        ops = {path.name for path in (ROOT / "csrc" / device).iterdir() if path.is_dir()} - {"core"}
        below |= {(device, op): {("common",), (device, "core")} for op in ops}
    wrong = []
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        own = path.relative_to(ROOT / "csrc").parent.parts
        if path.stem == "bindings":
            continue
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.M):
            target = Path(name).parent.parts
            if target not in below[own] | {own} and name != "emulate.h":
                wrong.append(f"{path.relative_to(ROOT)} includes {name}")
    assert not wrong, "\n".join(wrong)


def test_only_native_imports_the_extension():
    found = modules()
    importers = {
        module
        for module, path in found.items()
        for target, _ in imports(path, {*found, "pymerge._C"})
        if target == "pymerge._C"
    }
    assert importers == {"pymerge.backends.native"}


def test_references_import_torch_and_plain_data_only():
    found = modules()
    for module, path in found.items():
        if module.startswith("pymerge.reference"):
            for target, line in imports(path, set(found)):
                assert layer(target) <= layer("pymerge.rules") or target.startswith(
                    "pymerge.reference"
                ), f"{path}:{line}"


HEAVY = ("torch", "numpy", "pydantic", "rich", "yaml", "safetensors", "huggingface_hub")


def run_python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        **options,
    )  # type: ignore[call-overload]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from pymerge.cli.main import commands; commands(['--help'],"
        f" standalone_mode=False); print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_import_pymerge_imports_nothing_heavy():
    result = run_python(
        "-c", f"import sys, pymerge; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_help_is_quick(record_property):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = run_python("-m", "pymerge", "--help")
        times.append(time.perf_counter() - start)
        assert result.returncode == 0 and "Commands:" in result.stdout
    record_property("seconds", min(times))
    # 0.15 s on an idle machine (0.3 s is promised); the bound leaves room for tests that run beside
    # this one.
    assert min(times) < 1.5
