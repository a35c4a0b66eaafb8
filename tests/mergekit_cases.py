"""What tests beside the installed mergekit share."""

from __future__ import annotations

from typing import Any


def in_order(config: Any) -> list[Any]:
    """The models in the order of the recipe; mergekit has them in that of a set of texts, which is
    another in every process.
    """
    found = [] if config.base_model is None else [config.base_model]
    for part in (config, *(config.modules or {}).values()):
        found += [each.model for each in part.models or ()]
        found += [source.model for piece in part.slices or () for source in piece.sources]
    return list(dict.fromkeys(found))
