"""What can be wrong with a merge. Every message names the thing, what was found, and the way out."""

from __future__ import annotations

from collections.abc import Iterable


class MergeError(ValueError):
    """A merge that cannot be done as asked. `problems` holds every reason found, one sentence each.

    Raised with one sentence, or with several at once (`MergeError(["...", "..."])`), which are then listed.
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
    """Not enough memory, or no further thread."""


class DeviceError(MergeError):
    """A GPU that is not there, cannot be used, or has no room."""
