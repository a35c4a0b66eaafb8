"""Merging model folders: plan, read ahead, compute, write behind.

Inputs are mapped and the kernels read them where they are; outputs are computed into reused blocks, or into
the mapped output where a tensor is larger than a block. What is in anonymous memory does not depend on the
models' size or number. torch is imported for pickled inputs only.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pymerge._interrupt import Uninterrupted
from pymerge._manifest import finished_files, manifest_text, new_manifest
from pymerge._run import Run, scratch_bytes
from pymerge.checkpoint.assets import write_assets
from pymerge.checkpoint.folder import MANIFEST, OutputFolder
from pymerge.checkpoint.layout import Shard, index_json, lay_out, parse_size
from pymerge.checkpoint.reader import Inputs, OpenModel, open_models
from pymerge.checkpoint.statistics import open_statistics
from pymerge.checkpoint.tokens import TokenReader
from pymerge.errors import CheckpointError, ConfigError, MismatchError, resources_told
from pymerge.gpu.device import open_device, parse_device
from pymerge.gpu.run import GpuRun
from pymerge.plan import MergeRecipe, ModelHeader
from pymerge.planner import Plan, build_plan
from pymerge.summary import MergeSummary

Config = str | Path | Mapping[str, Any] | MergeRecipe
Progress = Callable[[int, int, str], None]

REPORT = "merge_report"
_SMALL_FILES = (
    64 << 20
)  # allowed for tokenizer, configs and index when the room on the disk is checked


@resources_told()
def plan_checkpoints(config: Config, *, seed: int = 0) -> Plan:
    """What merging would do, from the headers alone: tensors, parameters, bytes, and every problem.

    config: a YAML file in mergekit's format, a mapping of the same keys, or a recipe. Problems of the models
    taken together are in the plan; a bad configuration or an unreadable model is raised, as ConfigError or
    CheckpointError with all that was found.
    """
    recipe, notes = _recipe(config, seed, allow_non_finite=False)
    models = open_models(recipe.models)
    try:
        open_statistics(models, recipe.statistics)
        return _plan(recipe, models, notes)
    finally:
        _close(models)


@resources_told()
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
    progress: Progress | None = None,
) -> MergeSummary:
    """Merge model folders as a configuration says, into a folder that transformers loads.

    config: a YAML file in mergekit's format, a mapping of the same keys, or a recipe.
    out: the folder to make; nothing appears under that name before the merge is complete.
    device: "cpu", "cuda" or "cuda:1": where it is computed. The weight files are the same, byte for byte, but for tensors that
        mats or regmean solved: these agree to rounding (docs/spec/mats.md).
    device_memory: the most GPU memory taken, in bytes or as "4GB"; by default what is free, at most 4GB. Larger tensors are
        merged in parts, layers that do not fit are solved on the CPU.
    threads: for the computation; 0 takes all. The result is the same, byte for byte, for every number, with the same exception.
    out_shard_size: bytes, or "5GB", "500MB": the most tensor data in one file.
    overwrite: replace `out` where it holds a model.
    resume: go on where an interrupted merge into `out` stopped, after checking the hashes of the files that it finished;
        OutputError, with what differs, where that was another merge.
    dry_run: do all checks and write nothing.
    allow_non_finite: let NaN and infinity through (docs/spec/ties.md, N1 and N2); by default they are an error.
    seed: of the random masks (T8).
    progress: called with (bytes done, bytes in all, tensor name) after every tensor, on the calling thread.

    Raises MergeError: ConfigError, CheckpointError, DeviceError, MismatchError and OutputError before any work; NonFiniteError,
    DiskFullError and ResourceError during it. After an error nothing is left; after KeyboardInterrupt what `resume` can use. It is raised when
    that is so, whenever and however often the keys were pressed: the work itself is done on a thread of its own.
    """
    started = time.monotonic()
    number = parse_device(device)
    memory = None if device_memory is None else parse_size(device_memory, "device_memory")
    if number is None and memory is not None:
        raise ConfigError(f"device_memory={device_memory!r} is for a GPU; pass device='cuda' too")
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads={threads!r} is a {type(threads).__name__}; pass a whole number")
    if threads < 0:
        raise ValueError(f"threads={threads} is negative; pass 0 for all")
    shard_size = parse_size(out_shard_size)
    gpu = None if number is None else open_device(number)
    recipe, notes = _recipe(config, seed, allow_non_finite)
    models = open_models(recipe.models)
    work: Uninterrupted[None] | None = None
    try:
        open_statistics(models, recipe.statistics)
        plan = _plan(recipe, models, notes)
        if plan.problems:
            raise MismatchError(plan.problems)
        inputs = [path for model in models for path in model.places]
        folder = OutputFolder(Path(out), inputs, overwrite=overwrite)
        shards = lay_out(plan.tensors, shard_size)
        needed = sum(shard.nbytes for shard in shards) + scratch_bytes(plan, Inputs(models))
        folder.check_space(needed + _SMALL_FILES)
        summary = MergeSummary(
            out=folder.out,
            files=tuple(shard.file for shard in shards),
            tensors=len(plan.tensors),
            parameters=plan.parameters,
            notes=plan.notes,
        )
        if not dry_run:
            run = (
                Run(plan, models, folder, summary, threads, progress)
                if gpu is None
                else GpuRun(plan, models, folder, summary, threads, progress, gpu, memory)
            )
            options = {
                "seed": seed,
                "out_shard_size": shard_size,
                "allow_non_finite": allow_non_finite,
            }
            manifest = new_manifest(recipe, plan, models, shards, options)

            def write() -> None:
                try:
                    _write(recipe, plan, models, folder, shards, run, manifest, resume)
                finally:
                    _close(models)

            work = Uninterrupted(write)
            work.run()
            summary.notes = (*plan.notes, *run.notes)
    finally:
        if work is None or work.over():  # else it closes them itself
            _close(models)
    summary.seconds = time.monotonic() - started
    return summary


def _recipe(config: Config, seed: int, allow_non_finite: bool) -> tuple[MergeRecipe, list[str]]:
    if isinstance(config, MergeRecipe):
        return config, []
    from pymerge.recipe import read_recipe

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe = read_recipe(config, seed=seed, non_finite="allow" if allow_non_finite else "error")
    return recipe, [str(each.message) for each in caught]


def _plan(recipe: MergeRecipe, models: Sequence[OpenModel], notes: list[str]) -> Plan:
    for model in models:
        notes.extend(model.notes)
    return build_plan(recipe, _headers(models), notes)


def _headers(models: Sequence[OpenModel]) -> list[ModelHeader]:
    """With the tokens of every model. Raises CheckpointError for damaged tokenizer files."""
    reader = TokenReader()
    headers = []
    problems: list[str] = []
    for model in models:
        try:
            headers.append(replace(model.header, tokens=reader.read(model.folder)))
        except CheckpointError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(problems)
    return headers


def _close(models: Sequence[OpenModel]) -> None:
    for model in models:
        model.close()


def _write(
    recipe: MergeRecipe,
    plan: Plan,
    models: Sequence[OpenModel],
    folder: OutputFolder,
    shards: Sequence[Shard],
    run: Run,
    manifest: dict[str, Any],
    resume: bool,
) -> None:
    folder.open()
    try:
        done = finished_files(folder, manifest, shards, run.notes) if resume else {}
    except BaseException:
        folder.close()  # and nothing else: what is there may still be resumed
        raise
    finished = False
    try:
        folder.keep_only(done)
        manifest["outputs"] = dict(done)
        for file in done:
            run.skip(next(shard for shard in shards if shard.file == file), done[file])

        def shard_done(shard: Shard, entry: dict[str, Any]) -> None:
            manifest["outputs"][shard.file] = entry
            folder.write_text(MANIFEST, manifest_text(manifest))

        run.shards([shard for shard in shards if shard.file not in done], shard_done)
        if len(shards) > 1:
            folder.write_text("model.safetensors.index.json", index_json(plan.tensors, shards))
        write_assets(folder, recipe, plan, models)
        if run.solver is not None:
            _write_reports(folder, run)
        methods = run.summary.methods.items()
        manifest["methods"] = {name: dict(vars(method)) for name, method in sorted(methods)}
        manifest["outputs"] = {
            shard.file: _final(manifest["outputs"][shard.file]) for shard in shards
        }
        folder.write_text(MANIFEST, manifest_text(manifest))
        folder.publish()
        finished = True
    except KeyboardInterrupt:
        if manifest["outputs"] and folder.partial.is_dir():
            folder.keep_only([*manifest["outputs"], MANIFEST])
            finished = True
        raise
    finally:
        if finished:
            folder.close()
        else:
            folder.discard()


def _write_reports(folder: OutputFolder, run: Run) -> None:
    """What happened to every tensor of a merge by statistics, for people and for programs."""
    from pymerge.ops._mats_report import as_json, as_table, warnings_of

    reports = run.solver.ordered()
    folder.write_text(f"{REPORT}.txt", as_table(reports) + "\n")
    folder.write_text(f"{REPORT}.json", as_json(reports) + "\n")
    run.notes += warnings_of(reports)


def _final(entry: dict[str, Any]) -> dict[str, Any]:
    return {"bytes": entry["bytes"], "sha256": entry["sha256"]}
