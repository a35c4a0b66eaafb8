"""Drop-ins with other packages' signatures, computed by `pymerge.ties`.

`pymerge.compat.peft`, `pymerge.compat.mergekit` and `pymerge.compat.ties_merging` (the official
TIES code). Import a function from here instead of from there, or let `pymerge.compat.peft.patch()`
and `pymerge.compat.mergekit.patch()` put it there.
"""

from __future__ import annotations

from pymerge.compat import mergekit, peft, ties_merging

__all__ = ["mergekit", "peft", "ties_merging"]
