"""Merging model folders: plan, read ahead, compute, write behind.

Inputs are mapped and the kernels read them in place, or, if truncating a mapped file would kill the
process, read into a ring buffer; outputs are computed into reused blocks, or into memory of an
unnamed file if a tensor is larger than a block. The use of anonymous memory does not depend on the
models' size or number. torch is imported only for pickled inputs, merges by statistics and GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pymerge.backends import native, registry
from pymerge.checkpoint.contents import MANIFEST, REPORTS
from pymerge.checkpoint.files import as_json
from pymerge.checkpoint.folder import OutputFolder
from pymerge.checkpoint.inputs import Inputs, open_models
from pymerge.checkpoint.layout import (
    Shard,
    check_shard_size,
    index_json,
    kept_metadata,
    lay_out,
    parse_shard_size,
    parse_size,
)
from pymerge.checkpoint.reader import ADAPTER, OpenModel
from pymerge.engine.adapted_models import Opener, check_vectors
from pymerge.engine.adapter_output import check_rank, plan_adapter
from pymerge.engine.assets import Assets, collect_assets, lend_config, without_tokenizer
from pymerge.engine.card import model_card
from pymerge.engine.cpu import scratch_bytes
from pymerge.engine.gpu.device import AUTO, Device, open_device, parse_device
from pymerge.engine.manifest import finished_files, new_manifest
from pymerge.engine.observer import Observer, check_observer
from pymerge.engine.run import MergeRun
from pymerge.engine.sizes import SIZES, Sizes
from pymerge.engine.summary import MergeSummary
from pymerge.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    MismatchError,
    as_resource_errors,
)
from pymerge.interrupt import Uninterrupted
from pymerge.messages.arguments import argument, check_flags
from pymerge.messages.words import type_of
from pymerge.planning.adapter_plan import Rank
from pymerge.planning.plan import Plan
from pymerge.planning.planner import build_plan
from pymerge.recipe.model import MergeRecipe

Config = str | Path | Mapping[str, Any] | MergeRecipe
Progress = Callable[[int, int, str], None]

_SMALL_FILES = 64 << 20  # allowance for everything but the weights in the check of disk space


@as_resource_errors()
def plan_checkpoints(config: Config, *, seed: int = 0, strict: bool = False) -> Plan:
    """What a merge would do, from headers and small files only: tensors, parameters, bytes and
    every problem.

    config: a YAML file in mergekit's format, a mapping of the same keys, or a recipe. strict: as of
    `merge_checkpoints`. Problems of the models taken together are in the plan; a bad configuration
    or an unreadable model is raised, as ConfigError or CheckpointError with all that was found. So
    is an environment variable with a value that no merge takes, as DeviceError (the backend) or
    ValueError.
    """
    check_flags(strict=strict)
    _check_backend(registry.check_folders)
    if native.why_not() is None:  # a plan needs no kernels
        native.check_variables()
    return plan_unchecked(config, seed, strict)


def plan_unchecked(
    config: Config, seed: int, strict: bool = False, rank: Rank | None = None
) -> Plan:
    """`plan_checkpoints` without the check of environment variables, which a merge makes for its
    own arguments.
    """
    return Uninterrupted(functools.partial(_plan_of, config, seed, strict, rank)).run()


def _plan_of(config: Config, seed: int, strict: bool, rank: Rank | None = None) -> Plan:
    models, plan = open_plan(config, seed, strict, rank)
    close_inputs(models)
    return plan


def open_plan(
    config: Config, seed: int, strict: bool, rank: Rank | None = None
) -> tuple[list[OpenModel], Plan]:
    """The plan, and its models, which the caller closes."""
    recipe, notes = _recipe(config, seed, allow_non_finite=False, strict=strict)
    models = open_inputs(recipe)
    try:
        return models, _plan(recipe, models, notes, rank)[0]
    except BaseException:
        close_inputs(models)
        raise


@as_resource_errors()
def merge_checkpoints(
    config: Config,
    out: str | Path,
    *,
    device: str = "cpu",
    device_memory: str | int | None = None,
    threads: int = 0,
    out_shard_size: str | int = "5GB",
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    allow_non_finite: bool = False,
    seed: int = 0,
    full_paths: bool = False,
    strict: bool = False,
    rank: Rank | None = None,
    copy_tokenizer: bool = True,
    write_model_card: bool = True,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> MergeSummary:
    """Merge model folders as a configuration says, into a folder that transformers loads.

    config: a YAML file in mergekit's format, a mapping of the same keys, or a recipe.
    out: the folder to make; nothing appears under that name before the merge is complete.
    device: "cpu", "cuda" or "cuda:1": where it is computed; "auto" takes a GPU where one is there
        and layers are solved, for which it is faster (docs/checkpoints.md). The weight files are
        the same, byte for byte, but for tensors that mats or regmean solved: these agree to
        rounding (docs/spec/mats.md).
    device_memory: the most GPU memory taken, in bytes or as "4GB"; by default 90 % of what is free,
        at most five times the largest tensor with its inputs. Larger tensors are merged in parts,
        layers that do not fit are solved on the CPU.
    threads: for the computation; 0 takes all. The result is the same, byte for byte, for every
        number, with the same exception.
    out_shard_size: the most tensor data in one file: "5GB", "500MB" or a number are bytes; "5B",
        "500M", "100K" are parameters, whatever their dtype. A tensor that is larger is alone in its
        file; ConfigError where most are.
    overwrite: replace `out` where it holds a model and nothing that a merge would not write.
    resume: go on where an interrupted merge into `out` stopped, after checking the hashes of the
        files that it finished; OutputError, with what differs, where that was another merge.
    dry_run: do all checks and write nothing.
    allow_non_finite: let NaN and infinity through (docs/spec/ties.md, N1 and N2); by default they
        are an error.
    seed: of the random masks (T8).
    full_paths: write the local paths of the recipe into model card and manifest; by default their
        last components are there, as few as tell them apart.
    strict: make an error of tensors that not all models have; by default what the base has is
        copied, and what only others have is left out, with a note (docs/checkpoints.md).
    rank: of adapters of one base, write an adapter instead of a model (docs/lora.md): of the exact
        sum of their updates ("exact"), or of the best approximation with this rank in each module.
    copy_tokenizer: copy the tokenizer's files; without, a tokenizer that the recipe names
        (`tokenizer_source`) is still written.
    write_model_card: write README.md, with the recipe in it.
    progress: called with (bytes done, bytes in all, tensor name) after every tensor, on the calling
        thread.
    observer: looks at the inputs of every tensor while they are in memory, such as
        `pymerge.AnalysisObserver()` (docs/analyze.md).

    Raises ValueError and TypeError for arguments that have no meaning. Raises MergeError:
    ConfigError, CheckpointError, DeviceError, MismatchError and OutputError before any work;
    NonFiniteError, DiskFullError and ResourceError during it, CheckpointError where an input
    changes meanwhile (docs/checkpoints.md). After an error nothing is left; after KeyboardInterrupt
    the finished files, for `resume`. KeyboardInterrupt is raised only once these are safe, however
    often the keys were pressed, since the work runs on a thread of its own. If something else takes
    the output's name meanwhile, an OutputError at the end says where the finished model is.

    Logs what it does, and the notes of the result, at level INFO (logger "pymerge.merge").
    """
    published: list[Path] = []
    work = functools.partial(
        _merge,
        config,
        out,
        device=device,
        device_memory=device_memory,
        threads=threads,
        out_shard_size=out_shard_size,
        overwrite=overwrite,
        resume=resume,
        dry_run=dry_run,
        allow_non_finite=allow_non_finite,
        seed=seed,
        full_paths=full_paths,
        strict=strict,
        rank=rank,
        copy_tokenizer=copy_tokenizer,
        write_model_card=write_model_card,
        progress=progress,
        observer=observer,
        published=published,
    )
    try:
        # Imports included, since an interrupt would leave a half-imported, unusable torch.
        return Uninterrupted(work).run()
    except KeyboardInterrupt:
        if published:  # it came too late to stop anything
            raise KeyboardInterrupt(f"interrupted when {published[0]} was complete") from None
        raise


def _merge(
    config: Config,
    out: str | Path,
    *,
    device: str,
    device_memory: str | int | None,
    threads: int,
    out_shard_size: str | int,
    overwrite: bool,
    resume: bool,
    dry_run: bool,
    allow_non_finite: bool,
    seed: int,
    full_paths: bool,
    strict: bool,
    rank: Rank | None,
    copy_tokenizer: bool,
    write_model_card: bool,
    progress: Progress | None,
    observer: Observer | None,
    published: list[Path],
    sizes: Sizes = SIZES,
) -> MergeSummary:
    """The body of `merge_checkpoints`, on a thread of its own. published: receives the folder once
    it has its final name.
    """
    started = time.monotonic()
    number = parse_device(device)
    memory = None if device_memory is None else parse_size(device_memory, "device_memory")
    if number is None and memory is not None:
        raise ConfigError(
            f"{argument('device_memory', device_memory)} is for a GPU; pass"
            f" {argument('device', 'cuda')} too"
        )
    check_flags(
        overwrite=overwrite,
        resume=resume,
        dry_run=dry_run,
        allow_non_finite=allow_non_finite,
        full_paths=full_paths,
        strict=strict,
        copy_tokenizer=copy_tokenizer,
        write_model_card=write_model_card,
    )
    if not isinstance(out, (str, os.PathLike)):
        raise TypeError(f"{argument('out')} is {type_of(out)}; pass the path of a folder")
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(
            f"{argument('threads', threads)} is {type_of(threads)}; pass a whole number"
        )
    if threads < 0:
        raise ValueError(f"{argument('threads', threads)} is negative; pass 0 for all")
    if progress is not None and not callable(progress):
        raise TypeError(
            f"{argument('progress', progress)} is {type_of(progress)}; pass a function of (bytes"
            " done, bytes in all, tensor name)"
        )
    shard_size = parse_shard_size(out_shard_size, "out_shard_size")
    if rank is not None:
        check_rank(rank)
    if number is None:
        _check_backend(registry.check_folders_on_cpu)
    missing = native.why_not()
    if missing is not None:
        raise RuntimeError(missing)
    native.check_variables(threads)
    if number == AUTO:
        _check_backend(registry.check_folders)
    gpu: Device | None = None if number is None or number == AUTO else open_device(number)
    recipe, notes = _recipe(config, seed, allow_non_finite, strict)
    models = open_inputs(recipe)
    try:
        plan, assets = _plan(
            recipe, models, notes, rank, full_paths=full_paths, copy_tokenizer=copy_tokenizer
        )
        if number == AUTO:
            gpu = _gpu_that_pays(plan)
        if plan.problems:
            raise (CheckpointError if plan.problems == assets.problems else MismatchError)(
                plan.problems
            )
        inputs = [path for model in models for path in model.places]
        inputs += [*assets.sources, *([Path(config)] if isinstance(config, (str, Path)) else [])]
        folder = OutputFolder(Path(out), inputs, overwrite=overwrite)
        check_shard_size(plan.tensors, shard_size, out_shard_size)
        if rank is None:
            metadata = kept_metadata(models[recipe.base or 0].metadata)
            stem = models[recipe.base or 0].stem
        else:
            metadata, stem = {}, ADAPTER
        library = "peft" if stem == ADAPTER else "transformers"
        shards = lay_out(plan.tensors, shard_size, metadata, stem)
        if stem == ADAPTER and len(shards) > 1:
            raise ConfigError(
                f"{argument('out_shard_size', out_shard_size)} makes {len(shards)} files of the"
                " adapter, and peft loads one alone; pass more"
            )
        small = dict(assets.files)
        if write_model_card:
            card = model_card(recipe, folder.out.name, full_paths=full_paths, library=library)
            small["README.md"] = card.encode("utf-8", "backslashreplace")
        if len(shards) > 1:
            small[f"{stem}.safetensors.index.json"] = index_json(plan.tensors, shards).encode()
        needed = sum(shard.nbytes for shard in shards) + scratch_bytes(plan, Inputs(models), sizes)
        folder.check_space(needed + max(_SMALL_FILES, 2 * sum(map(len, small.values()))))
        summary = MergeSummary(
            out=folder.out,
            files=tuple(shard.file for shard in shards),
            tensors=len(plan.tensors),
            parameters=plan.parameters,
            notes=plan.notes,
        )
        summary.log_start(len(models), recipe.method, dry_run)
        if not dry_run:
            run = _run(plan, models, folder, summary, threads, progress, gpu, memory, sizes)
            run.observer = check_observer(observer)
            options = {
                "seed": seed,
                "out_shard_size": shard_size.plain,
                "allow_non_finite": allow_non_finite,
                **({} if rank is None else {"rank": rank}),
            }
            files = [*small, *(REPORTS if run.reporting else ())]
            manifest = new_manifest(
                recipe, plan, models, shards, files, assets.copied, options, full_paths=full_paths
            )

            try:
                _write(folder, plan, shards, small, run, manifest, resume)
            except Exception:
                run.check_inputs()  # a changed input explains the error better
                raise
            published.append(folder.out)
            summary.notes = (*plan.notes, *run.notes)
    finally:
        close_inputs(models)
    summary.seconds = time.monotonic() - started
    summary.log_end(dry_run)
    return summary


def _run(
    plan: Plan,
    models: Sequence[OpenModel],
    folder: OutputFolder,
    summary: MergeSummary,
    threads: int,
    progress: Progress | None,
    gpu: Device | None,
    memory: int | None,
    sizes: Sizes,
) -> MergeRun:
    on: tuple[Device, int] | None = None
    if gpu is not None:
        from pymerge.engine.gpu.executor import memory_of

        on = gpu, memory_of(gpu, memory, plan.gpu_memory)
    return MergeRun(plan, models, folder, summary, threads, progress, on, sizes)


def _gpu_that_pays(plan: Plan) -> Device | None:
    """For device="auto": the first GPU, where it is faster and can be used."""
    if plan.gpu_pays:
        with contextlib.suppress(DeviceError):
            return open_device(0)
    _check_backend(registry.check_folders_on_cpu)
    return None


def _check_backend(check: Callable[[], None]) -> None:
    try:
        check()
    except ValueError as error:
        raise DeviceError(str(error)) from None


def _recipe(
    config: Config, seed: int, allow_non_finite: bool, strict: bool = False
) -> tuple[MergeRecipe, list[str]]:
    if isinstance(config, MergeRecipe):
        return replace(config, strict=config.strict or strict), []
    from pymerge.recipe.resolve import recipe_and_notes

    non_finite = "allow" if allow_non_finite else "error"
    recipe, notes = recipe_and_notes(config, seed=seed, non_finite=non_finite)
    return replace(recipe, strict=strict), notes


def open_inputs(recipe: MergeRecipe) -> list[OpenModel]:
    tokenizer = recipe.tokenizer if recipe.tokenizer_only else None
    base = None if recipe.base is None else recipe.models[recipe.base]
    models = open_models(recipe.models, recipe.statistics, tokenizer, Opener(base))
    try:
        check_vectors([each for k, each in enumerate(models) if k != tokenizer])
    except CheckpointError:
        close_inputs(models)
        raise
    lend_config(recipe, models)
    return models


def _plan(
    recipe: MergeRecipe,
    models: Sequence[OpenModel],
    notes: list[str],
    rank: Rank | None = None,
    *,
    full_paths: bool = False,
    copy_tokenizer: bool = True,
) -> tuple[Plan, Assets]:
    """The plan, with problems of small files added to its own."""
    for model in models:
        notes.extend(model.notes)
    headers = [model.header for model in models]
    plan = build_plan(recipe, headers, notes)
    if rank is not None:
        return plan_adapter(recipe, plan, models, rank, full_paths=full_paths)
    assets = collect_assets(recipe, plan, models, [header.tokens for header in headers])
    if not copy_tokenizer and recipe.tokenizer is None:
        assets = without_tokenizer(assets, recipe.chat_template)
    problems = (*plan.problems, *assets.problems)
    return replace(plan, notes=(*plan.notes, *assets.notes), problems=problems), assets


def close_inputs(models: Sequence[OpenModel]) -> None:
    for model in models:
        model.close()


def _write(
    folder: OutputFolder,
    plan: Plan,
    shards: Sequence[Shard],
    small: Mapping[str, bytes],
    run: MergeRun,
    manifest: dict[str, Any],
    resume: bool,
) -> None:
    outputs: dict[str, Any] = manifest["outputs"]
    kept = resume  # keep the folder's content while it may still be resumed
    complete = False
    try:
        folder.open()
        done = finished_files(folder, manifest, plan, shards, run.notes) if resume else {}
        outputs.update({shard.file: done[shard.file] for shard in shards if shard.file in done})
        kept = False
        folder.keep_only([*done, MANIFEST] if done else ())
        folder.write(MANIFEST, as_json(manifest))  # first: it identifies the merge's own files
        # Early, so that a full disk shows before the work. Space for weights is allocated file by
        # file.
        for name, content in small.items():
            folder.write(name, content)
        for shard in shards:
            if shard.file in done:
                folder.made(shard.file, shard.nbytes, done[shard.file]["sha256"])
                run.skip(shard, done[shard.file])

        def shard_done(shard: Shard, entry: dict[str, Any]) -> None:
            folder.made(shard.file, shard.nbytes, entry["sha256"])
            outputs[shard.file] = entry
            folder.write(MANIFEST, as_json(manifest))

        run.shards([shard for shard in shards if shard.file not in done], shard_done)
        run.observe_the_rest()
        run.check_inputs()
        if run.reporting:
            run.write_reports()
        methods = run.summary.methods.items()
        manifest["methods"] = {name: dict(vars(method)) for name, method in sorted(methods)}
        # In the order of the shards, and complete, so that the merge can be resumed if its name is
        # taken.
        manifest["outputs"] = {shard.file: outputs[shard.file] for shard in shards}
        folder.write(MANIFEST, as_json(manifest))
        folder.check_complete()
        kept = complete = True
        run.notes += folder.publish()
    except KeyboardInterrupt:
        if outputs and not complete:
            folder.keep_only([*outputs, MANIFEST])
            kept = True
        raise
    finally:
        if kept:
            folder.close()
        else:
            folder.discard()
