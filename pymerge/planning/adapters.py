"""Matches an adapter's modules with the tensors of its base, and says what does not fit. Reads
headers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pymerge.checkpoint.adapter import OpenAdapter, Update
from pymerge.checkpoint.types import ModelHeader, TensorInfo
from pymerge.dtypes import MERGEABLE, elements
from pymerge.errors import MismatchError
from pymerge.messages.words import counted, some_names
from pymerge.planning.coverage import embedding, is_output, ties
from pymerge.planning.name_matching import complete_renamings
from pymerge.planning.unmergeable import why_unmergeable
from pymerge.planning.vocabulary import IN_LAYER

_WEIGHT, _BIAS = ".weight", ".bias"


@dataclass(frozen=True)
class Target:
    """The tensor of the base to which an update is added. transposed: it is stored (d_in, d_out).
    bias: the name of the module's bias, where that gets an update too.
    """

    update: Update
    tensor: str
    transposed: bool
    bias: str | None = None


@dataclass
class Application:
    """What an adapter does to its base. replaced: name in the base, or a name of its own -> name in
    the adapter. unties: whether the sum has an output layer, where the base's is its embedding.
    outputs: such a layer that the adapter updates -> the embedding whose copy it updates.
    """

    targets: list[Target] = field(default_factory=list)
    replaced: dict[str, str] = field(default_factory=dict)
    unties: bool = False
    outputs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def apply_to(adapter: OpenAdapter, base: ModelHeader) -> Application:
    """Match the adapter with the base. Raises MismatchError with everything that does not fit."""
    why = why_unmergeable(base)
    if why is not None:
        raise MismatchError(
            f"model {base.reference}, the base of the adapter {adapter.reference}, {why}"
        )
    found = Application()
    names = _flat_names(adapter, base, found) if adapter.groups else _names(adapter, base)
    updates = {module: each for module, each in adapter.updates.items() if module in names}
    problems: list[str] = []
    misfits: list[str] = []
    sideways = _sideways(adapter, base, names)
    for module, update in updates.items():
        tensor = names[module]
        transposed = _is_transposed(update, base.tensors[tensor], sideways)
        if transposed is None:
            misfits.append(
                f"{tensor} is {list(base.tensors[tensor].shape)} and the update"
                f" {list(_shape(update))}"
            )
            continue
        bias = None
        if update.bias is not None:
            bias = tensor.removesuffix(_WEIGHT) + _BIAS
            bias_shape = base.tensors[bias].shape if bias in base.tensors else None
            if bias_shape != update.bias.info.shape:
                misfits.append(f"{bias} is {bias_shape} and its update {update.bias.info.shape}")
        if update.magnitude is not None:
            outputs = _outputs(base.tensors[tensor], transposed or update.embeds)
            if elements(update.magnitude.info.shape) != outputs:
                misfits.append(
                    f"{tensor} has {outputs} outputs and the update's magnitudes are"
                    f" {list(update.magnitude.info.shape)}"
                )
        found.targets.append(Target(update, tensor, transposed, bias))
    if misfits:
        more = f", and {counted(len(misfits) - 1, 'other')} like it" if misfits[1:] else ""
        problems.append(
            f"adapter {adapter.reference} does not fit {base.reference}: {misfits[0]}{more}; name"
            f" the model that it was trained on{_by_config(adapter)}"
        )
    written = [
        name for each in found.targets for name in (each.tensor, each.bias) if name is not None
    ]
    twice = sorted({name for name in written if written.count(name) > 1})
    if twice:
        problems.append(
            f"adapter {adapter.reference} has several updates of {some_names(twice)} of"
            f" {base.reference}; take out those that are meant for another model"
        )
    codes = [
        name
        for name in written
        if name in base.tensors and base.tensors[name].dtype not in MERGEABLE
    ]
    if codes:
        problems.append(
            f"adapter {adapter.reference} updates {some_names(codes)} of {base.reference}, which"
            f" cannot be computed with; name a base in one of {', '.join(MERGEABLE)}"
        )
    found.replaced = {names.get(name, name): name for name in adapter.replaced}
    problems += _ties(adapter, base, found)
    if problems:
        raise MismatchError(problems)
    return found


def _by_config(adapter: OpenAdapter) -> str:
    return f" (by its config {adapter.base})" if adapter.base else ""


def _names(adapter: OpenAdapter, base: ModelHeader) -> dict[str, str]:
    """Modules and replaced tensors -> names in the base. Every update has one."""
    modules = {module + _WEIGHT: module for module in adapter.updates}
    # An output layer that the base ties to its embedding is not in its files: `_ties` tells.
    absent = {
        name
        for name in modules
        if is_output(name) and name not in base.tensors and embedding(base.tensors) is not None
    }
    mine = {
        name: TensorInfo(name, "float32", _shape(adapter.updates[module]))
        for name, module in modules.items()
    }
    mine |= {name: stored.info for name, stored in adapter.replaced.items()}
    stored = [name for name in adapter.replaced if name not in absent]
    needed = [name for name in modules if name not in absent] or stored
    if absent and not needed:
        return {}
    ways = complete_renamings(mine, base.tensors, needed)
    if not ways:
        lacking = [name for name in needed if name not in base.tensors]
        raise MismatchError(
            f"adapter {adapter.reference} updates modules that {base.reference} does not have, nor"
            f" with any one prefix: {some_names(lacking)}; name the model that it was trained"
            f" on{_by_config(adapter)}"
        )
    if len(ways) > 1:
        one, other = (some_names(way[name] for name in needed[:1]) for way in ways[:2])
        raise MismatchError(
            f"adapter {adapter.reference}: {needed[0]} may be {one} or {other} of"
            f" {base.reference}; rename the adapter's tensors"
        )
    way = ways[0]
    return {modules.get(name, name): new for name, new in way.items()}


def _flat_names(adapter: OpenAdapter, base: ModelHeader, found: Application) -> dict[str, str]:
    """Of kohya's names, in which underscores stand for dots. Modules of other models, as the text
    encoders beside a unet, are left out as a whole.
    """
    flat: dict[str, list[str]] = {}
    for name in base.tensors:
        if name.endswith(_WEIGHT):
            flat.setdefault(name.removesuffix(_WEIGHT).replace(".", "_"), []).append(name)
    names: dict[str, str] = {}
    unmatched: dict[str, list[str]] = {}
    for group in dict.fromkeys(adapter.groups.values()):
        modules = [module for module, its in adapter.groups.items() if its == group]
        bare = [module.removeprefix(group) for module in modules]
        prefixes = [name[: -len(bare[0])] for name in flat if name.endswith(f"_{bare[0]}")]
        whole = [
            prefix
            for prefix in ("", *prefixes)
            if all(len(flat.get(prefix + each, ())) == 1 for each in bare)
        ]
        if len(whole) == 1:
            names |= {
                module: flat[whole[0] + each][0] for module, each in zip(modules, bare, strict=True)
            }
        else:
            unmatched[group] = modules
    if not names or any(_has_some(flat, g, modules) for g, modules in unmatched.items()):
        listed = [module for modules in unmatched.values() for module in modules]
        raise MismatchError(
            f"adapter {adapter.reference} updates modules that {base.reference} does not have, with"
            f" underscores for dots: {some_names(listed)}; name the model that it was trained on,"
            " with the names of the library that the adapter's are from (diffusers or the original)"
        )
    for group, modules in unmatched.items():
        found.notes.append(
            f"{adapter.reference}: its {counted(len(modules), 'update')} {group}... are for another"
            f" model than {base.reference}, and are left out"
        )
    return names


def _has_some(flat: Mapping[str, object], group: str, modules: Iterable[str]) -> bool:
    """Whether the base has some of a group's modules, so that the group is meant for it."""
    return any(module.removeprefix(group) in flat for module in modules)


def _shape(update: Update) -> tuple[int, ...]:
    """Of the weight, as torch's own layers store it."""
    a, b = update.a.info.shape, update.b.info.shape
    return (a[1], b[0]) if update.embeds else (b[0], *a[1:])


def _fits(shape: tuple[int, ...], tensor: TensorInfo) -> bool:
    """A linear layer's weight may be stored as a convolution by one element, and the reverse."""
    its = tensor.shape
    return shape == its or (shape[:2] == its[:2] and max([1, *shape[2:], *its[2:]]) == 1)


def _outputs(weight: TensorInfo, columns: bool) -> int:
    """How many outputs a weight has: rows, or columns where it is stored (d_in, d_out)."""
    rows = weight.shape[0]
    return elements(weight.shape) // max(1, rows) if columns else rows


def _sideways(adapter: OpenAdapter, base: ModelHeader, names: Mapping[str, str]) -> bool:
    """Whether square weights are stored (d_in, d_out): as those in layers that are not square, else
    by the adapter's config. peft sets the config's flag by the last module that it saw.
    """
    seen = set()
    for module, update in adapter.updates.items():
        shape = _shape(update)
        tensor = base.tensors.get(names.get(module, ""))
        if tensor is None or update.embeds or len(shape) != 2 or shape[0] == shape[1]:
            continue
        if IN_LAYER.search(tensor.name) and tensor.shape in (shape, shape[::-1]):
            seen.add(tensor.shape == shape[::-1])
    if len(seen) == 1:
        return seen.pop()
    return adapter.config is not None and adapter.config.transposed


def _is_transposed(update: Update, tensor: TensorInfo, sideways: bool) -> bool | None:
    """None where the update does not fit."""
    shape = _shape(update)
    if _fits(shape, tensor):
        square = len(shape) == 2 and shape[0] == shape[1] and len(tensor.shape) == 2
        return square and sideways and not update.embeds and not is_output(tensor.name)
    turned = len(shape) == 2 and not update.embeds and shape[::-1] == tensor.shape
    return True if turned else None


def _ties(adapter: OpenAdapter, base: ModelHeader, found: Application) -> list[str]:
    """Problems and notes of an embedding that is the output layer too."""
    names = [target.tensor for target in found.targets]
    known = {target.update.module for target in found.targets}
    left = [module for module in adapter.updates if module not in known]
    tied = embedding(base.tensors)
    outputs = [name for name in left if is_output(name + _WEIGHT) and not adapter.groups]
    if outputs and tied is not None and not _takes_apart(adapter, base, outputs, tied, found):
        return [
            f"adapter {adapter.reference} updates {some_names(outputs)}, which {base.reference}"
            f" ties to its embedding {tied}: merged, the update would change both; give"
            f" {base.reference} an output layer of its own (transformers:"
            " config.tie_word_embeddings = False, lm_head.weight a copy of the embedding)"
        ]
    if tied is None or not ties(base.config) or any(map(is_output, base.tensors)):
        return []
    copied = () if adapter.config is None else adapter.config.copied
    if not found.outputs and any(
        is_output(name + _WEIGHT) or f".{tied}".endswith(f".{name}{_WEIGHT}") for name in copied
    ):
        # Copies are trained by themselves; what is saved beside a resized vocabulary is still tied.
        found.unties = any(map(is_output, found.replaced))
        if tied in found.replaced and not found.unties:
            return [
                f"adapter {adapter.reference} has another {tied}, and was trained beside the output"
                f" layer of {base.reference}, which is its own {tied}; give {base.reference} an"
                " output layer of its own (transformers: config.tie_word_embeddings = False,"
                " lm_head.weight a copy of the embedding)"
            ]
    if found.unties:
        found.notes.append(
            f"adapter {adapter.reference} {'updates the' if found.outputs else 'brings an'} output"
            f" layer, and {base.reference} ties its own to the embedding: the sum has two, and"
            " tie_word_embeddings is false in its config"
        )
    if tied in names and not found.unties:
        found.notes.append(
            f"adapter {adapter.reference} updates {tied}, which is the output layer of"
            f" {base.reference} too: merged, the update changes both, as peft's merge does, whereas"
            " in training it may have changed the embedding alone"
        )
    return []


def _takes_apart(
    adapter: OpenAdapter,
    base: ModelHeader,
    outputs: list[str],
    tied: str,
    found: Application,
) -> bool:
    """Give the output layer that an adapter updates a place of its own: in training the update was
    added to its outputs, not to the embedding that it shares its weight with. False where its name
    in the base is not known, or the update does not fit.
    """
    update, name = adapter.updates[outputs[0]], outputs[0] + _WEIGHT
    info = base.tensors[tied]
    renamed = any(each.tensor != each.update.module + _WEIGHT for each in found.targets)
    if len(outputs) > 1 or renamed or not ties(base.config):
        return False
    if update.bias is not None or info.dtype not in MERGEABLE or _shape(update) != info.shape:
        return False
    found.targets.append(Target(update, name, transposed=False))
    found.outputs[name] = tied
    found.unties = True
    return True
