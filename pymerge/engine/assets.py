"""What a model folder holds beside the weights: configs, tokenizer, code, companions.

All of it is read, and the bytes to write are prepared, before a merge begins, so that none of it
can fail at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pymerge.checkpoint.adapter import AdaptedModel
from pymerge.checkpoint.adapter_config import CONFIG as ADAPTER_CONFIG
from pymerge.checkpoint.companions import find_companions
from pymerge.checkpoint.contents import ASSETS, CONFIG, CONFIGS, GENERATION, TOKENIZER
from pymerge.checkpoint.files import (
    MAX_TOKENIZER,
    as_json,
    exists,
    is_folder,
    parse_object,
    read_bounded,
    reason,
)
from pymerge.checkpoint.links import own_files
from pymerge.checkpoint.reader import QUANTISATION_FILES, OpenModel
from pymerge.checkpoint.tokens import Tokens
from pymerge.engine.chat_template import commonest, set_template
from pymerge.engine.modules import collect_modules
from pymerge.engine.special_tokens import SpecialTokens, code_of
from pymerge.engine.tokenizer_files import change_tokens
from pymerge.errors import CheckpointError
from pymerge.messages.words import some_names
from pymerge.planning.plan import Plan, Vocabulary
from pymerge.planning.unmergeable import declared, declares, is_quantised
from pymerge.recipe.chat_templates import AUTO
from pymerge.recipe.model import MergeRecipe

_MOST = 256 << 20  # bytes of all files; the largest tokenizers have a tenth of that


@dataclass(frozen=True)
class Assets:
    """files: name -> content. sources: the files that were read. notes: what is left out. problems:
    what cannot be read or written. made: the files come from no model.
    """

    files: Mapping[str, bytes]
    sources: tuple[Path, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    made: bool = False

    @property
    def copied(self) -> Mapping[str, bytes]:
        """The files that come from models."""
        return {} if self.made else self.files


def collect_assets(
    recipe: MergeRecipe,
    plan: Plan,
    models: Sequence[OpenModel],
    tokens: Sequence[Tokens | None] = (),
) -> Assets:
    """Everything but the model card; what the source folder lacks is left out. tokens: of every
    model. Without them the configs keep their special tokens.
    """
    main = models[recipe.base or 0]
    giver = _config_giver(recipe, models)
    chosen = models[recipe.tokenizer] if recipe.tokenizer is not None else main
    speaker = _speaker(chosen)
    found = _Collected()
    if speaker is giver:
        found.copy(giver, (CONFIG, *ASSETS))
    else:
        found.copy(giver, (CONFIG, *CONFIGS))
        found.copy(speaker, TOKENIZER)
        found.copy_code(speaker)
    speaks_only = recipe.tokenizer_only  # that model is not merged
    merged = [each for each in models if not (speaks_only and each is chosen)]
    if main.header.adapter:
        found.copy(main, (ADAPTER_CONFIG,))
    found.copy_modules(main, merged, recipe.strict)
    found.copy_companions(giver)
    if giver is not main:
        found.notes.append(
            f"{main.reference} has no {CONFIG}; that of {giver.reference} is taken, and its other"
            " small files"
        )
    found.note_origins()
    files = found.files
    if files.pop(CONFIG, None) is not None and not plan.problems:
        config = dict(main.header.config)
        if not is_quantised(main.header):
            untrue = (*declared(config), *main.header.quantisation_files)
            config = _without_declarations(config)
            if untrue:
                found.notes.append(
                    f"{main.reference}: its weights are not quantized, though {some_names(untrue)}"
                    " says so; the result does not have that"
                )
        try:
            files[CONFIG] = as_json(fixed_config(config, plan))
        except (ValueError, RecursionError) as error:
            found.problems.append(
                f"{main.reference}: its {CONFIG} cannot be written again ({error})"
            )
    moved = plan.vocabulary.new_ids if plan.vocabulary is not None else {}
    if moved and GENERATION in files:
        files[GENERATION] = _with_moved_ids(files[GENERATION], moved)
    if speaker is not giver and speaker.folder is not None and tokens:
        rows = None if plan.vocabulary is None else plan.vocabulary.rows
        own = tokens[models.index(chosen)]
        special = SpecialTokens(speaker.folder, files, own, rows, plan.tokenizer)
        found.notes += special.set_in(files)
    if plan.tokenizer is not None and not plan.problems:
        found.problems += change_tokens(files, plan.tokenizer)
    template = recipe.chat_template
    if template == AUTO:
        template, read, notes, problems = commonest(map(_speaker, merged))
        found.sources += read
        found.notes += notes
        found.problems += problems
    if template is not None:
        found.problems += set_template(files, template)
    return Assets(files, tuple(found.sources), tuple(found.notes), tuple(found.problems))


def lend_config(recipe: MergeRecipe, models: Sequence[OpenModel]) -> None:
    """Let the model that gives the result's names have the config that the result gets."""
    main, giver = models[recipe.base or 0], _config_giver(recipe, models)
    if giver is not main:
        main.header = replace(main.header, config=giver.header.config)


def _config_giver(recipe: MergeRecipe, models: Sequence[OpenModel]) -> OpenModel:
    """The model whose config and other small files the result gets: the base, else the first. Where
    that is a checkpoint of torch.distributed, which seldom has a config.json beside it, the one
    that the recipe names for its tokenizer.
    """
    main = models[recipe.base or 0]
    if recipe.tokenizer is None or not main.distributed or _has_config(main):
        return main
    chosen = models[recipe.tokenizer]
    return chosen if _has_config(chosen) else main


def _has_config(model: OpenModel) -> bool:
    return model.folder is not None and exists(model.folder / CONFIG)


def without_tokenizer(assets: Assets, chat_template: str | None) -> Assets:
    """The same but for the files of a tokenizer at the top of the folder. chat_template: the
    recipe's, which goes with them.
    """

    def kept(name: str) -> bool:
        patterns = (each for each in TOKENIZER if ("/" in each) == ("/" in name))
        return not any(fnmatchcase(name, pattern) for pattern in patterns)

    notes = assets.notes
    if chat_template is not None:
        notes = (*notes, "the recipe's chat_template is left out, as the tokenizer is")
    return replace(
        assets, files={n: each for n, each in assets.files.items() if kept(n)}, notes=notes
    )


def _speaker(model: OpenModel) -> OpenModel:
    """The model, or its adapter where that has a tokenizer of its own."""
    own = model.speaker if isinstance(model, AdaptedModel) else None
    return own or model


class _Collected:
    """Gathers what `Assets` holds."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.sources: list[Path] = []
        self.notes: list[str] = []
        self.problems: list[str] = []
        self._held = 0
        self._modules: list[str] = []  # folders whose weights are copied
        self._origins: dict[str, list[str]] = {}  # model -> what was copied beyond the usual

    def copy(self, model: OpenModel, patterns: Sequence[str]) -> None:
        """Copy assets by name. An asset that exists but cannot be read is a problem."""
        if model.folder is None:
            return
        found = list(_matching(model.folder, patterns))
        self.sources += found
        # A link out of the folder is read, as for weights, but its content is not copied.
        own, left_out = own_files(model.folder, found)
        self.notes += left_out
        for path in own:
            try:
                # Only record that there is a config: it was read with the model.
                content = b"" if path.name == CONFIG else read_bounded(path, MAX_TOKENIZER)
            except (OSError, ValueError) as error:
                self.problems.append(f"{path}: {reason(error)}; mend it, or move it away")
                continue
            self._held += len(content)
            if self._held > _MOST:
                self.problems.append(
                    f"{model.folder}: the small files that a merge copies have more than {_MOST}"
                    " bytes; move away what does not belong to the model"
                )
                return
            self.files[path.relative_to(model.folder).as_posix()] = content
            if patterns is TOKENIZER:
                self._origins.setdefault(model.reference, []).append(path.name)

    def copy_code(self, model: OpenModel) -> None:
        """Copy the modules that a model's tokenizer needs, where the config comes from another
        model.
        """
        for name in [] if model.folder is None else code_of(model.folder, self.files):
            before = self.files.pop(name, None)
            self.copy(model, (name,))
            if before is not None and self.files.get(name, before) != before:
                self.notes.append(
                    f"{name} differs between the models that give the config and the tokenizer;"
                    f" that of {model.reference} is copied, since its tokenizer needs it"
                )
            self._origins.setdefault(model.reference, []).append(name)

    def copy_modules(self, model: OpenModel, models: Sequence[OpenModel], strict: bool) -> None:
        """The weights of modules that lie in folders of their own."""
        found = collect_modules(model, models, strict=strict)
        self.files |= found.files
        self.sources += found.sources
        self.notes += found.notes
        self.problems += found.problems
        self._modules = found.folders

    def copy_companions(self, model: OpenModel) -> None:
        """Copy whatever else belongs to the model that gives the config."""
        if model.folder is None:
            return
        quantised = is_quantised(model.header)
        without = () if quantised else QUANTISATION_FILES
        found = find_companions(model.folder, without, self._modules)
        folders = {name.partition("/")[0] for name in self.files if "/" in name}
        for name in folders & found.files.keys():
            del found.files[name]
            found.left_out["there is a folder of that name, from another model"] = [name]
        self.files |= found.files
        self.notes += found.notes(model.folder)
        if found.files:
            self._origins.setdefault(model.reference, []).extend(found.files)

    def note_origins(self) -> None:
        """Add a note on files beyond the usual ones: what was copied from which model."""
        origins = [f"{some_names(names)} from {model}" for model, names in self._origins.items()]
        if origins:
            self.notes.append(f"copied: {'; '.join(origins)}")


def _matching(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Names as given, and for a pattern the files of the folder that match it."""
    for pattern in patterns:
        if "*" in pattern:
            if not is_folder((folder / pattern).parent):  # `companions` tells what it is
                continue
            try:
                found = sorted(folder.glob(pattern))
            except OSError as error:
                raise CheckpointError(f"{folder}: {reason(error)}") from error
            yield from (path for path in found if not is_folder(path))
        elif exists(folder / pattern):
            yield folder / pattern


def fixed_config(config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """config.json with the dtype and vocabulary of the result and, for slices, the number and kinds
    of its layers.
    """
    config.update(plan.config)
    if plan.dtype:
        _set_dtype(config, plan.dtype)
        said = {"dtype", "torch_dtype", "_class_name"}  # the last by diffusers, which has no dtype
        if not said & config.keys():
            config["torch_dtype"] = plan.dtype
    if plan.vocabulary is not None:
        _set_vocabulary(config, plan.vocabulary)
    return config


def _without_declarations(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, nested ones included, without entries that declare its weights quantised."""
    return {
        key: _without_declarations(value)
        if isinstance(value, Mapping) and key.endswith("_config")
        else value
        for key, value in config.items()
        if not declares(key, value)
    }


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            config[key] = dict(value)
            _set_dtype(config[key], dtype)


def _set_vocabulary(config: dict[str, Any], vocabulary: Vocabulary) -> None:
    """V7: set the number of rows, and rename tokens by their new ids."""
    nested = config.get("text_config")
    if isinstance(nested, dict):
        config["text_config"] = dict(nested)
        _set_vocabulary(config["text_config"], vocabulary)
    if "vocab_size" in config or not isinstance(nested, dict):
        config["vocab_size"] = vocabulary.rows
    config.update(_with_new_ids(config, vocabulary.new_ids))


def _with_new_ids(config: Mapping[str, Any], new_ids: Mapping[int, int | None]) -> dict[str, Any]:
    """The entries that name tokens by id and have to change."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if not key.endswith(("_token_id", "_token_index")):
            continue
        if type(value) is int and value in new_ids:
            changed[key] = new_ids[value]
        elif isinstance(value, list) and any(v in new_ids for v in value if type(v) is int):
            moved = [new_ids.get(v, v) for v in value if type(v) is int]
            changed[key] = [v for v in moved if v is not None] or None
    return changed


def _with_moved_ids(content: bytes, new_ids: Mapping[int, int | None]) -> bytes:
    try:
        read = parse_object(content, Path(GENERATION))
        changed = _with_new_ids(read, new_ids)
        return as_json(read | changed) if changed else content
    except (CheckpointError, ValueError, RecursionError):  # as damaged as the original
        return content
