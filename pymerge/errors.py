"""What can be wrong with a merge. Every message names the thing, what was found, and the way
out.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator


class MergeError(ValueError):
    """A merge that cannot be done as asked. `problems` holds every reason found, one sentence each.

    Raised with one sentence, or with several at once (`MergeError(["...", "..."])`), which are then
    listed.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__(self._message())

    def _message(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        listed = "\n".join(f"  - {problem}" for problem in self.problems)
        return f"{len(self.problems)} problems:\n{listed}"


class ConfigError(MergeError):
    """The recipe itself: unknown keys, wrong types, values out of range, unknown methods."""


class CheckpointError(MergeError):
    """An input that is missing, truncated, hostile or of an unknown format."""


class MismatchError(MergeError):
    """Inputs that are well formed but do not fit together: names, shapes, dtypes, vocabularies."""


class NonFiniteError(MergeError):
    """A NaN or an infinity among the inputs."""


class OutputError(MergeError):
    """An output folder that cannot or must not be written."""


class DiskFullError(OutputError):
    """Not enough room for the result."""


class ResourceError(MergeError):
    """Not enough memory, or no further thread or open file."""


class DeviceError(MergeError):
    """A GPU that is not there, cannot be used, or has no room."""


# How those put it whose exceptions say it in words alone: torch, the kernel through others, the
# loader of libraries.
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "failed to map segment",
    "cannot map zero-fill pages",
)
_NO_THREAD = "can't start new thread"
_NO_FILES = (errno.EMFILE, errno.ENFILE)
OF_THE_PROCESS = (errno.ENOMEM, *_NO_FILES)  # no fault of the path that an OSError names


@contextlib.contextmanager
def resources_told() -> Iterator[None]:
    """ResourceError for what the system denies: memory, however it was asked for, threads and open
    files.
    """
    try:
        yield
    except MergeError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
            raise ResourceError(
                "the system starts no further thread for this process; end other programs, or raise"
                " the limit (ulimit -u)"
            ) from error
        if isinstance(error, OSError) and error.errno in _NO_FILES:
            raise ResourceError(
                "the system opens no further file for this process; close other files, or raise the"
                " limit (ulimit -n)"
            ) from error
        if isinstance(error, MemoryError) or any(said in str(error) for said in _NO_MEMORY):
            raise ResourceError(
                "not enough memory; end other programs, raise the limit (ulimit -v), or take a"
                " machine with more"
            ) from error
        raise
