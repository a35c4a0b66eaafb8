"""Which tensors a module of a recipe has: mergekit's names of the parts of models that see and
read, or encode and decode, found by tensor names instead of a list of architectures.
"""

from __future__ import annotations

from collections.abc import Collection

# Names of modules that are the same part -> words of tensor names between dots that tell it. The
# projector comes first, since some models have it inside the part that sees (visual.merger).
_PARTS: dict[tuple[str, ...], frozenset[str]] = {
    ("multi_modal_projector",): frozenset(
        {"multi_modal_projector", "merger", "deepstack_merger_list"}
    ),
    ("vision_tower", "vision_model"): frozenset({"vision_tower", "vision_model", "visual"}),
}
_HALVES = ("encoder", "decoder")
# Those that have what belongs to no other, the first that there is: the text model of a model that
# sees, the embedding and head that T5's halves share, the half of Whisper that writes.
_REST = ("text_decoder", "default", "shared", "decoder")


def module_of(name: str, modules: Collection[str]) -> str | None:
    """The module that a tensor belongs to, of those that a recipe names; None where it names none
    for it. A module may also be called as the names of its tensors begin (`model.visual`).
    """
    begun = [module for module in modules if name.startswith(f"{module}.")]
    if begun:
        return max(begun, key=len)
    words = name.split(".")
    for called, telling in _PARTS.items():
        if not telling.isdisjoint(words):
            return next((module for module in called if module in modules), None)
    if not set(_HALVES).isdisjoint(modules):
        half = next((word for word in words if word in _HALVES), None)
        if half is not None:
            return half if half in modules else None
    return next((module for module in _REST if module in modules), None)
