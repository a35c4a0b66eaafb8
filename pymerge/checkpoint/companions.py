"""Files beside the weights that belong to the model: processors, pooling of embedding models, code,
licences, in subfolders too.

The folder may hold anything, so hidden files, weights, pickles and links are not copied, and the
number and size of the other files are bounded.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pymerge.checkpoint.contents import CONFIG, MANIFEST, REPORTS, is_asset, is_file_name
from pymerge.checkpoint.files import IrregularError, is_folder, read_bounded, reason
from pymerge.checkpoint.links import own_files
from pymerge.messages.words import some_names

_DEPTH = 4
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|keras|msgpack|ot|onnx|onnx_data|pb|tflite|npz"
    r"|npy|pkl|pickle|joblib|dill|nemo|mar|engine|plan|distcp|pdparams|mlmodel|llamafile)"
    r"(\.index\.json)?",
    re.I,
)
_BINARIES = re.compile(r".*\.(zip|tar|gz|tgz|bz2|xz|zst|7z|rar|so|dll|dylib|exe|whl|pyc)", re.I)
# First bytes of pickles, zip files, GGUF, HDF5 and programs, whatever their name.
_NOT_TEXT = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04|GGUF|\x89HDF|\x7fELF")
# Files that the merge writes itself, that describe how this one model was made, or that would make
# transformers look for an adapter.
_NOT_ITS_OWN = re.compile(
    "|".join(map(re.escape, (CONFIG, "README.md", MANIFEST, *REPORTS)))
    + r"|mergekit_config\.ya?ml|trainer_state\.json|training_args\..*"
    r"|(all|train|eval)_results\.json|adapter_config\.json|events\.out\.tfevents.*"
    r"|.*\.(lock|tmp|log)|desktop\.ini|Thumbs\.db"
)
_CACHES = {"__pycache__", "wandb", "mlruns", "runs", "logs", "node_modules"}


@dataclass(frozen=True)
class Limits:
    """The most that is copied. nbytes: of all files together; an image of a model card takes one
    or two MB. file: bytes of one. files: their number. seen: entries that are examined, since the
    model's folder may be somebody's home.
    """

    nbytes: int = 64 << 20
    file: int = 16 << 20
    files: int = 1000
    seen: int = 20_000


LIMITS = Limits()


@dataclass
class Companions:
    """files: name -> content. left_out: reason -> names. links: notes on links that lead out of the
    folder.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)

    def notes(self, folder: Path) -> list[str]:
        return self.links + [
            f"{folder}: {some_names(names)} {'is' if len(names) == 1 else 'are'} not copied ({why})"
            for why, names in self.left_out.items()
        ]


def find_companions(
    folder: Path,
    without: Collection[str] = (),
    modules: Collection[str] = (),
    limits: Limits = LIMITS,
) -> Companions:
    """All of it but the assets of known names, which `engine.assets` reads. without: names at the
    top that are left out too. modules: folders whose weights the result has. Never raises: what
    cannot be had is told in `left_out`.
    """
    found = Companions()
    walk = _Walk(folder, found, modules, limits)
    walk.folder("", 0)
    held = 0
    own, found.links = own_files(folder, [folder / name for name in walk.names])
    for path in own:
        name = path.relative_to(folder).as_posix()
        if name in without:
            continue
        if held > limits.nbytes:
            found.left_out.setdefault(f"more than {limits.nbytes} bytes in all", []).append(name)
            continue
        try:
            content = read_bounded(path, limits.file)
        except (OSError, ValueError) as error:
            large = isinstance(error, OSError) and error.errno == errno.EFBIG
            why = f"more than {limits.file} bytes" if large else reason(error)
            found.left_out.setdefault(why, []).append(name)
            continue
        if _NOT_TEXT.match(content):
            why = "holds weights, pickles or a program, by its first bytes"
            found.left_out.setdefault(why, []).append(name)
        else:
            held += len(content)
            found.files[name] = content
    return found


class _Walk:
    def __init__(
        self, root: Path, found: Companions, modules: Collection[str], limits: Limits
    ) -> None:
        self.names: list[str] = []
        self._root = root
        self._seen = 0
        self._found = found
        self._limits = limits
        # With the folders in which they lie.
        self._modules = {f"{part}/" for path in modules for part in _and_parents(path)}

    def folder(self, prefix: str, depth: int) -> None:
        files, folders = self._entries(prefix)
        for name in files:
            path = prefix + name
            if _WEIGHTS.fullmatch(name) or (not prefix and _NOT_ITS_OWN.fullmatch(name)):
                continue
            if is_asset(path):
                continue
            if _BINARIES.fullmatch(name):
                self._leave("an archive or a program", path)
            elif len(self.names) >= self._limits.files:
                self._leave(f"more than {self._limits.files} files in all", path)
            else:
                self.names.append(path)
        for name in folders:
            path = f"{prefix}{name}/"
            if name in _CACHES or is_asset(path[:-1]):
                continue
            if not prefix and is_file_name(name):
                self._leave("a folder by the name of a file that merges write", path)
            elif depth == _DEPTH:
                self._leave(f"more than {_DEPTH} folders deep", path)
            elif path not in self._modules and self._holds_weights(path, depth + 1):
                self._leave("holds weights of its own, which are not merged", path)
            else:
                self.folder(path, depth + 1)

    def _leave(self, why: str, path: str) -> None:
        self._found.left_out.setdefault(why, []).append(path)

    def _entries(self, prefix: str) -> tuple[list[str], list[str]]:
        """Files, links to files, and folders that are not hidden and have printable names."""
        files, folders = [], []
        try:
            found = self._list(prefix)
        except OSError as error:
            self._leave(reason(error), prefix or "what is in it")
            return [], []
        for entry in sorted(found, key=lambda entry: entry.name):
            if entry.name.startswith(".") or not entry.name.isprintable():
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            elif entry.is_symlink() and is_folder(Path(entry.path)):
                if not is_asset(f"{prefix}{entry.name}/x.jinja"):  # told with what is in it
                    self._leave("a link to a folder", f"{prefix}{entry.name}/")
            else:
                files.append(entry.name)
        return files, folders

    def _list(self, prefix: str) -> list[os.DirEntry[str]]:
        """Entries of a folder. Raises OSError, also after too many entries in all."""
        with os.scandir(self._root / prefix) as entries:
            found = list(itertools.islice(entries, self._limits.seen + 1 - self._seen))
        self._seen += len(found)
        if self._seen > self._limits.seen:
            text = f"more than {self._limits.seen} entries in all"
            raise IrregularError(errno.E2BIG, text, str(self._root / prefix))
        return found

    def _holds_weights(self, prefix: str, depth: int) -> bool:
        try:
            found = self._list(prefix)
        except OSError:
            return False  # left to the check of the folder itself
        if any(_WEIGHTS.fullmatch(entry.name) for entry in found):
            return True
        return depth < _DEPTH and any(
            self._holds_weights(f"{prefix}{entry.name}/", depth + 1)
            for entry in found
            if entry.is_dir(follow_symlinks=False)
        )


def _and_parents(path: str) -> Iterator[str]:
    parts = path.split("/")
    return ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
