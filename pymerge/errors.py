"""The errors of a merge. Every message names the subject, what was found, and the way out."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator


class MergeError(ValueError):
    """A merge that cannot be done as asked. `problems` holds every reason, one sentence each.

    Raised with one sentence, or with a list of them, which is then shown as a list.
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
    """A problem of the recipe: unknown keys, wrong types, values out of range, unknown methods."""


class CheckpointError(MergeError):
    """An input that is missing, truncated, malicious or in an unknown format."""


class MismatchError(MergeError):
    """Valid inputs that do not fit together: names, shapes, dtypes, vocabularies."""


class NonFiniteError(MergeError):
    """A NaN or an infinity among the inputs."""


class OutputError(MergeError):
    """An output folder that cannot or must not be written."""


class DiskFullError(OutputError):
    """Not enough room for the result."""


class ResourceError(MergeError):
    """Not enough memory, or no further thread or open file."""


class EvaluationError(MergeError):
    """An evaluation in a sweep that failed, or that gave no number to compare settings by."""


class DeviceError(MergeError):
    """A GPU that is missing, unusable or full."""


# In exceptions that report a lack of memory by their text alone: those of torch, of the kernel by
# way of other libraries, of the dynamic loader.
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
def as_resource_errors() -> Iterator[None]:
    """Raises ResourceError where the system denies memory, threads or open files, whichever library
    ran into it.
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
