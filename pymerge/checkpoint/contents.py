"""What a folder holds: files that a merge writes, which it may replace, and foreign ones, which it
never deletes.

Everything here uses open folders and follows no link, so that renames by another process have no
effect.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from pymerge.checkpoint.files import (
    MAX_INDEX,
    parse_object,
)
from pymerge.errors import CheckpointError

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "tekken.json",
    "*.tiktoken",
    "*.model",
    "*.spm",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


CONFIGS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "*.py",  # code that a config's auto_map names; loading it still requires trust_remote_code
)


# Names and patterns of the well-known files that are copied; `companions` finds others.
ASSETS = (*TOKENIZER, *CONFIGS)


CONFIG = "config.json"
GENERATION = "generation_config.json"


MANIFEST = "pymerge_manifest.json"
MANIFEST_FORMAT = 1
LOCK = ".lock"
REPORTS = ("merge_report.txt", "merge_report.json")

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_WEIGHTS = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model|adapter_model)"
    r"((-\d+-of-\d+)?\.(safetensors|bin)|\.(safetensors|bin)\.index\.json)"
)
_NAMES = {
    *(name for name in ASSETS if "*" not in name),
    *REPORTS,
    MANIFEST,
    LOCK,
    "config.json",
    "adapter_config.json",
    "README.md",
    # Tokenizers by their usual names; other copied files are in the manifest.
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    # Files that other tools leave behind, and nobody's work.
    "mergekit_config.yml",
    ".gitattributes",
    ".DS_Store",
}
# While a merge works: a file before it gets its name, and tempfile's where files need a name; the
# latter also where the former would be too long.
_BEFORE = re.compile(r"\.(.+)\.new")
_LONGEST = 255  # bytes of a name
_DEEPEST = 16  # folders in folders; what a merge copies lies less than half as deep
_SCRATCH = re.compile(r"tmp[a-z0-9_]{8}")


@dataclass
class Contents:
    """A folder's entries. files: name -> a stamp that changes when the file does."""

    files: dict[str, tuple[int, ...]] = field(default_factory=dict)
    folders: dict[str, Contents] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)

    @property
    def is_model(self) -> bool:
        return any(name == MANIFEST or _WEIGHTS.fullmatch(name) for name in self.files)

    def is_empty(self) -> bool:
        return not (self.files or self.folders or self.foreign)

    def listed(self) -> str:
        """The foreign entries, at most four by name."""
        rest = len(self.foreign) - 4
        return ", ".join(sorted(self.foreign)[:4]) + (f" and {rest} more" if rest > 0 else "")


def is_asset(path: str) -> bool:
    """Whether a file with this name, relative to the model's folder, is among `ASSETS`."""
    return any(
        fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in ASSETS
    )


def is_file_name(name: str) -> bool:
    """Whether a merge writes files of this name, so that a folder cannot have it."""
    return name in _NAMES or bool(_WEIGHTS.fullmatch(name))


def look(fd: int, *, working: bool = False) -> Contents:
    """The entries of the open folder `fd`. working: it is the hidden folder of a merge, which holds
    no links; in a model folder a link may stand for a file, and deleting it leaves its target.
    """
    return _look(fd, "", working, _copied(fd))


def _look(fd: int, prefix: str, working: bool, copied: Mapping[str, str]) -> Contents:
    found = Contents()
    with os.scandir(fd) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:  # deleted since
            continue
        path = prefix + name
        if stat.S_ISDIR(status.st_mode):
            ours = working or any(each.startswith(f"{path}/") for each in copied)
            ours = ours and path.count("/") < _DEEPEST
            inner = _inner(fd, prefix, name, working, copied) if ours else None
            # An empty folder does not show who made it.
            if inner is None or (inner.is_empty() and not working):
                found.foreign.append(f"{path}/")
            else:
                found.folders[name] = inner
                found.foreign += inner.foreign
            continue
        plain = stat.S_ISREG(status.st_mode) or (stat.S_ISLNK(status.st_mode) and not working)
        if plain and _is_own(fd, path, working, copied):
            found.files[name] = _identity(status)
        else:
            found.foreign.append(path)
    return found


def _inner(
    fd: int, prefix: str, name: str, working: bool, copied: Mapping[str, str]
) -> Contents | None:
    try:
        with opened(name, fd) as inner:
            return _look(inner, f"{prefix}{name}/", working, copied)
    except OSError:
        return None


def _is_own(fd: int, path: str, working: bool, copied: Mapping[str, str]) -> bool:
    """Whether a merge wrote this file. A file of any name counts as a merge's own while it has
    exactly the content that the manifest records. fd: the folder that holds it.
    """
    folder, slash, name = path.rpartition("/")
    before = _BEFORE.fullmatch(name) if working else None
    if before is not None:
        path = f"{folder}{slash}{before.group(1)}"
    if path in _NAMES or _WEIGHTS.fullmatch(path) or (working and _SCRATCH.fullmatch(name)):
        return True
    return path in copied and (working or copied[path] == _sha256(fd, name))


def _sha256(fd: int, name: str) -> str:
    sha = hashlib.sha256()
    try:
        with os.fdopen(open_file(name, fd), "rb") as file:
            while piece := file.read(4 << 20):
                sha.update(piece)
    except OSError:
        return ""
    return sha.hexdigest()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """What identifies a finished file without reading it again."""
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _copied(fd: int) -> Mapping[str, str]:
    """The SHA-256 of each file that a merge copied here, from its manifest."""
    try:
        files = parse_object(read(MANIFEST, fd), Path(MANIFEST), MAX_INDEX).get("copied")
    except (OSError, CheckpointError):
        return {}
    return files if isinstance(files, dict) else {}


def remove(fd: int, contents: Contents, keep: Iterable[str] = ()) -> list[str]:
    """Delete from the open folder `fd` what `contents` lists, except `keep`: files that have not
    changed, and folders that are empty afterwards; the lock last. Returns notes on what cannot be
    deleted.
    """
    kept = set(keep)
    problems: list[str] = []
    for name, inner in contents.folders.items():
        try:
            with opened(name, fd) as inside:
                problems += remove(inside, inner)
            os.rmdir(name, dir_fd=fd)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    for name in sorted(contents.files, key=lambda name: name == LOCK):
        if name in kept:
            continue
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if _identity(status)[:2] == contents.files[name][:2]:
                os.unlink(name, dir_fd=fd)
            else:
                problems.append(f"{name}: is another file now")
        except FileNotFoundError:
            pass
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    return problems


@contextmanager
def opened(name: str | os.PathLike[str], dir_fd: int | None = None) -> Iterator[int]:
    """An open folder; links are refused. Raises OSError."""
    fd = os.open(name, FOLDER, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def open_file(name: str, dir_fd: int) -> int:
    """A file in the open folder, open for reading. Raises OSError for anything but a regular
    file.
    """
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(f"{name} is not a file")
    return fd


def read(name: str, dir_fd: int) -> bytes:
    """Read a small file in the open folder. Raises OSError."""
    with os.fdopen(open_file(name, dir_fd), "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_INDEX:
            raise OSError(f"{name} is too large")
        return file.read()


def write(name: str, content: bytes, dir_fd: int) -> None:
    """Write a small file in the open folder atomically, creating the folders in its name. Raises
    OSError.
    """
    folder, _, rest = name.partition("/")
    if rest:
        with suppress(FileExistsError):
            os.mkdir(folder, dir_fd=dir_fd)
        with opened(folder, dir_fd) as inner:
            write(rest, content, inner)
        return
    beside = f".{name}.new"
    if len(os.fsencode(beside)) > _LONGEST:
        beside = f"tmp{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    with suppress(FileNotFoundError):
        os.unlink(beside, dir_fd=dir_fd)
    with os.fdopen(os.open(beside, NEW_FILE, 0o666, dir_fd=dir_fd), "wb") as file:
        file.write(content)
    os.replace(beside, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
