"""Builds `pymerge._C`, with ninja where it is installed: C++17, one binary with every CPU level,
CUDA kernels where asked for; no torch.

PYMERGE_CUDA        auto (default): with the CUDA kernels where nvcc is found; 0: without; 1: with,
                    or fail
PYMERGE_CUDA_ARCHS  compute capabilities from 75 on, default "80;90+PTX"; "+PTX" adds code for later
                    devices
PYMERGE_JOBS        parallel compilations, default one a processor
PYMERGE_REPOSITORY  address of the repository, where links of the README lead on a package index
CXX, NVCC           the compilers; CXXFLAGS and LDFLAGS are added to the commands
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import OptionError

ROOT = Path(__file__).resolve().parent
# No contraction: every backend gives the same bits (docs/spec/ties.md, Notation). Levels are
# `#pragma GCC target` regions, so no instruction set is named here.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-pthread",
    "-Wall",
    "-Wextra",
]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "-cudart=static",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]


def sources(with_cuda: bool) -> list[Path]:
    found = [ROOT / "csrc/bindings.cpp", *sorted((ROOT / "csrc/cpu").rglob("*.cpp"))]
    if with_cuda:
        cuda = ROOT / "csrc/cuda"
        found += sorted([*cuda.rglob("*.cu"), *cuda.rglob("*.cpp")])
    return found


def find_nvcc() -> str | None:
    """nvcc as NVCC names it, on the path, or under CUDA_HOME."""
    named = os.environ.get("NVCC")
    if named:
        found = shutil.which(named)
        if found is None:
            raise OptionError(f"NVCC={named!r} is no program; name nvcc's path, or unset it")
        return found
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next(
        (
            path
            for home in homes
            if home and (path := shutil.which("nvcc", path=str(Path(home) / "bin")))
        ),
        None,
    )


def want_cuda() -> str | None:
    """The nvcc to use, or None to build without CUDA."""
    asked = os.environ.get("PYMERGE_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise OptionError(f"PYMERGE_CUDA={asked!r} is not one of 'auto', '0', '1'")
    if asked == "0" or not any((ROOT / "csrc/cuda").rglob("*.cu")):
        return None
    nvcc = find_nvcc()
    if nvcc is None and asked == "1":
        raise OptionError(
            "PYMERGE_CUDA=1, but no nvcc was found: install the CUDA toolkit, put its bin folder on"
            " PATH or set CUDA_HOME, or build without the CUDA kernels with PYMERGE_CUDA=0"
        )
    return nvcc


def arch_flags() -> list[str]:
    """-gencode flags for PYMERGE_CUDA_ARCHS."""
    flags = []
    asked = os.environ.get("PYMERGE_CUDA_ARCHS") or "80;90+PTX"
    for arch in asked.replace(" ", ";").split(";"):
        if not arch:
            continue
        number = arch.removesuffix("+PTX").removeprefix("sm_").replace(".", "")
        if not re.fullmatch(r"[0-9]{2,3}[a-z]?", number):
            raise OptionError(
                f"PYMERGE_CUDA_ARCHS={asked!r} has {arch!r}, which is no compute capability such as"
                " 80, 9.0 or 90+PTX"
            )
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def codes_of(flags: Sequence[str]) -> str:
    """What csrc/cuda/core/architectures.h is told of them: "sm_80,sm_90,compute_90"."""
    return ",".join(flag.rpartition("code=")[2] for flag in flags)


def parallel_jobs() -> int | None:
    """PYMERGE_JOBS; None for one a processor."""
    asked = os.environ.get("PYMERGE_JOBS")
    if not asked:
        return None
    if not asked.isdecimal() or int(asked) < 1:
        raise OptionError(
            f"PYMERGE_JOBS={asked!r} is not a positive integer; unset it for one a processor"
        )
    return int(asked)


def find_ninja() -> str | None:
    """The ninja of the pip package, or the one on the path."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")


def escape(argument: object) -> str:
    """For a ninja file: ninja's own escapes on top of the shell's."""
    return shlex.quote(str(argument)).replace("$", "$$")


def path_escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


# (rule, inputs, output)
Edge = tuple[str, Sequence[Path], Path]


def run_plainly(
    rules: Sequence[tuple[str, list[str], str]], edges: Sequence[Edge], jobs: int
) -> None:
    """What ninja would do where nothing is built yet; the last edge links what the others make."""
    commands = {name: (command, rest) for name, command, rest in rules}

    def run(edge: Edge) -> None:
        rule, inputs, output = edge
        command, rest = commands[rule]
        named = {"$in": [str(path) for path in inputs]}
        words = [
            w for word in rest.split() for w in named.get(word, [word.replace("$out", str(output))])
        ]
        print(rule.upper(), output, flush=True)
        subprocess.run([*command, *words], check=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, edges[:-1]))
    run(edges[-1])


class NinjaBuild(build_ext):
    """Writes a build.ninja for the extension and runs it, so that a rebuild compiles what changed.
    Without ninja everything is compiled.
    """

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not build_temp, which pip makes anew for every editable build.
        nvcc = want_cuda()
        archs = [] if nvcc is None else arch_flags()
        jobs = parallel_jobs()
        kind = "cuda" if nvcc is not None else "cpu"
        folder = (
            ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{kind}"
        )
        for path in (folder, target.parent):
            path.mkdir(parents=True, exist_ok=True)
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        includes = [
            f"-I{ROOT / 'csrc'}",
            *(f"-isystem{p}" for p in (pybind11.get_include(), sysconfig.get_path("include"))),
        ]
        flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *includes]
        # Python's own symbols are in the process that loads it, which macOS has to be told.
        python = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else []
        link = ["-shared", "-pthread", *python, *shlex.split(os.environ.get("LDFLAGS", ""))]
        rules = [("cxx", [*cxx, *flags], "-MMD -MF $out.d -c $in -o $out")]
        if nvcc is not None:
            flags.append("-DPYMERGE_WITH_CUDA=1")
            rules = [("cxx", [*cxx, *flags], "-MMD -MF $out.d -c $in -o $out")]
            # Kernels include csrc only; nvcc knows no -isystem with its path attached.
            compiler = [
                nvcc,
                *NVCC_FLAGS,
                f"-ccbin={cxx[0]}",
                *archs,
                includes[0],
                "-DPYMERGE_WITH_CUDA=1",
                f'-DPYMERGE_CUDA_CODES="{codes_of(archs)}"',
            ]
            rules.append(("nvcc", compiler, "-MMD -MF $out.d -c $in -o $out"))
            rules.append(
                ("link", [nvcc, "-cudart=static", f"-ccbin={cxx[0]}", "-shared"], "$in -o $out")
            )
        else:
            rules.append(("link", [*cxx, *link], "$in -o $out"))

        lines = ["ninja_required_version = 1.5"]
        for name, command, rest in rules:
            lines += [f"rule {name}", f"  command = {' '.join(map(escape, command))} {rest}"]
            lines += ["  description = " + name.upper() + " $out"]
            if name != "link":
                lines += ["  depfile = $out.d", "  deps = gcc"]
        edges: list[Edge] = []
        for source in sources(nvcc is not None):
            name = source.relative_to(ROOT / "csrc").as_posix().replace("/", "_")
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            edges.append((rule, [source], folder / f"{name}.o"))
        edges.append(("link", [output for _, _, output in edges], target))
        for rule, inputs, output in edges:
            needed = " ".join(map(path_escape, inputs))
            lines.append(f"build {path_escape(output)}: {rule} {needed}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")

        ninja = find_ninja()
        try:
            if ninja is None:
                run_plainly(rules, edges, jobs or os.cpu_count() or 1)
            else:
                command = [ninja, "-C", str(folder), *(["-j", str(jobs)] if jobs else [])]
                subprocess.run([*command, *(["-v"] if self.verbose > 1 else [])], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"building {ext.name} failed (status {error.returncode}); the compiler's message is"
                " above"
            )


def long_description(repository: str) -> str:
    """README.md for a package index, which has no files that relative links could lead to: they
    lead to the repository, or, where its address is not known, are their text alone.
    """

    def absolute(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        if not repository:
            return "" if picture else text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/main/{target})"

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\[\]]*)\]\((?!\w+:|#)([^)\s]+)\)", absolute, readme)


repository = os.environ.get("PYMERGE_REPOSITORY", "").rstrip("/")
setup(
    long_description=long_description(repository),
    long_description_content_type="text/markdown",
    project_urls={
        "Source": repository,
        "Documentation": f"{repository}/blob/main/docs/index.md",
        "Issues": f"{repository}/issues",
        "Changes": f"{repository}/blob/main/CHANGELOG.md",
    }
    if repository
    else {},
    ext_modules=[
        Extension("pymerge._C", sources=[str(p.relative_to(ROOT)) for p in sources(True)])
    ],
    cmdclass={"build_ext": NinjaBuild},
)
