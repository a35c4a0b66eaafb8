"""The passes of a collection: forward, backward, results in memory or in parts on disk (rules S5,
S7, S9, S13).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pymerge.checkpoint.locks import held_alone
from pymerge.messages.arguments import argument
from pymerge.messages.words import counted, some_names
from pymerge.statistics._batches import (
    Source,
    batch_digest,
    examples_in,
    masks,
    model_device,
    numbers_in,
    to_device,
)
from pymerge.statistics._file import (
    PACKED,
    Header,
    Statistics,
    add_files,
    in_memory,
    pack,
    unpack,
    write,
)
from pymerge.statistics._file import load as load_file
from pymerge.statistics._fingerprint import fingerprint, tags_of
from pymerge.statistics._gradients import up
from pymerge.statistics._hooks import Recorder
from pymerge.statistics._loss import check_result, per_example_losses
from pymerge.statistics._options import GRADIENT_KINDS, Options, Progress
from pymerge.statistics._targets import Targets
from pymerge.version import __version__

# A pass that is finished or not, and what a killed process left of one that it was writing.
_PART = re.compile(r"\.?pass-\d{4}(\.partial)?\.safetensors(\.[0-9a-f]+\.part)?")
# How far a formula's gradient may be from autograd's before the formula is dropped for one backward
# pass per example.
_PROBE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_PROBE_TOLERANCE_LOW = 5e-2


class Collection:
    """The passes of one collection and what becomes of their results."""

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        leaders: Mapping[str, str],
        options: Options,
        source: Source,
        groups: list[list[str]],
        model_name: str,
    ) -> None:
        self.model, self.targets, self.leaders, self.options = model, targets, leaders, options
        self.source, self.groups = source, groups
        self.identity = {
            "name": model_name,
            "class": type(model).__name__,
            "fingerprint": fingerprint(model),
        }
        self.weights = tags_of(targets)
        self.digest: str | None = None

    def in_memory(self) -> Statistics:
        tensors: dict[str, torch.Tensor] = {}
        header: Header | None = None
        for number in range(len(self.groups)):
            one_pass = Pass(self, number)
            one_pass.run()
            tensors.update(one_pass.packed())
            own = one_pass.header()
            if header is None:
                header = own
            else:
                header["tensors"].update(own["tensors"])
        assert header is not None
        return in_memory(header, tensors)

    def to_file(self, out: Path, resume: bool, overwrite: bool) -> Statistics:
        folder = out.with_name(out.name + ".parts")
        _parts_in(folder)
        if len(self.groups) == 1 and not self.options.checkpoint_every and not folder.exists():
            return self._to_file(out, folder, overwrite)
        refusal = f"another run is collecting {out} now; wait for it, or give another name"
        with held_alone(folder, refusal):
            try:
                if _parts_in(folder) and not resume:
                    raise ValueError(
                        f"{folder} holds what an interrupted run collected; pass"
                        f" {argument('resume', True)} to go on from it, or delete it"
                    )
                return self._to_file(out, folder, overwrite)
            finally:
                with suppress(OSError):  # there is something to go on from
                    folder.rmdir()

    def _to_file(self, out: Path, folder: Path, overwrite: bool) -> Statistics:
        """The passes, each of whose results is in `folder` until all are."""
        parts = []
        for number in range(len(self.groups)):
            part = folder / f"pass-{number:04d}.safetensors"
            unfinished = folder / f"pass-{number:04d}.partial.safetensors"
            one_pass = Pass(self, number)
            if part.exists():
                finished = load_file(part)
                one_pass.check_same(finished)
                self.check_digest(finished.header["data"][0]["digest"])
            else:
                if unfinished.exists():
                    one_pass.restore(load_file(unfinished))
                one_pass.checkpoint = unfinished if self.options.checkpoint_every else None
                one_pass.run()
                last = len(self.groups) == 1
                # A part keeps its seed, for the run that may go on from it.
                header, sums = one_pass.header(partial=not last), one_pass.packed().items()
                write(out if last else part, header, sums, overwrite=overwrite and last)
                unfinished.unlink(missing_ok=True)
            parts.append(part)
        if len(self.groups) > 1:
            add_files(parts, out, overwrite=overwrite)
        for part in _parts_in(folder):
            part.unlink()
        return load_file(out)

    def check_digest(self, digest: str) -> None:
        """All passes must read the same batches."""
        if self.digest is not None and digest != self.digest:
            raise ValueError(
                "batches differ from one pass to the next; switch shuffling off, or raise "
                f"{argument('memory_limit')} to need one pass"
            )
        self.digest = digest


class Pass:
    """One group of sums: a run over all batches."""

    def __init__(self, collection: Collection, number: int) -> None:
        self.of, self.number = collection, number
        kinds = {key.partition("/")[0] for key in collection.groups[number]}
        self.gradients = any(kind in GRADIENT_KINDS for kind in kinds)
        self.recorder = Recorder(
            collection.model,
            collection.targets,
            collection.groups[number],
            collection.leaders,
            self.gradients,
            collection.options.loss_scale,
        )
        self.recorder.own_masks = callable(collection.options.mask)
        self.batches = self.rows = self.examples = self.tokens = 0
        self.digest = ""
        self.checkpoint: Path | None = None
        self.to_skip = 0
        self.resumed = ""

    def run(self) -> None:
        options = self.of.options
        with self.recorder.attached(), _gradients_off(self.of.model, self.recorder):
            if self.recorder.parameters:
                self._probe(self.of.source.first())
            for batch in self.of.source.all():
                chained = batch_digest(self.digest, batch)
                if self.to_skip:
                    self._skip(chained)
                    continue
                self._step(batch)
                self.digest = chained
                self.batches += 1
                bad = self.recorder.non_finite()
                if bad:
                    raise FloatingPointError(
                        f"batch {self.batches - 1} gives NaN or infinity in"
                        f" {counted(len(bad), 'sum')}, the"
                        f" first {bad[0]}; look for infinite activations or, in fp16, for a"
                        " loss_scale that overflows"
                    )
                every = options.checkpoint_every
                if self.checkpoint is not None and every and self.batches % every == 0:
                    header, sums = self.header(partial=True), self.packed().items()
                    write(self.checkpoint, header, sums, overwrite=True)
                if options.progress is not None:
                    options.progress(
                        Progress(
                            self.number,
                            len(self.of.groups),
                            self.batches,
                            self.examples,
                            self.tokens,
                        )
                    )
                if options.max_tokens is not None and self.tokens >= options.max_tokens:
                    break
        if self.to_skip:
            raise ValueError(
                "the data has fewer batches than the interrupted run had read; pass the same data"
            )
        self.of.check_digest(self.digest)

    def _skip(self, chained: str) -> None:
        self.to_skip -= 1
        self.digest = chained
        if self.to_skip == 0 and chained != self.resumed:
            raise ValueError(
                "the data is not what the interrupted run had read; pass the same data, unshuffled"
            )

    def _step(self, batch: Any) -> None:
        """One batch: forward, then one backward pass per draw of labels."""
        options, recorder = self.of.options, self.recorder
        numbers = numbers_in(batch, examples_in(batch), self.rows)
        batch = to_device(batch, model_device(self.of.model))
        mask_of, n, counted, tokens = masks(batch, options.mask, options.loss_name)
        if n == 0:
            return
        recorder.phase = "forward"
        recorder.begin(n, mask_of)
        if not self.gradients:
            with torch.no_grad(), autocast_of(options, batch, self.of.model):
                forward_only(options, self.of.model, batch)
        else:
            draws = self._losses(batch, n, numbers)
            losses = next(draws, None)
            while losses is not None:  # with the next one, until which the graph is kept
                following = next(draws, None)
                if losses.requires_grad:
                    self._backward(losses, retain=following is not None)
                losses = following
        recorder.end()
        self.rows += n
        self.examples += counted
        self.tokens += tokens

    def _losses(self, batch: Any, n: int, numbers: Sequence[int]) -> Iterator[torch.Tensor]:
        """Of one draw after the other: each holds a graph of the logits' size."""
        options = self.of.options
        assert options.loss is not None
        with torch.enable_grad(), autocast_of(options, batch, self.of.model):
            result = options.loss(self.of.model, batch)
            check_result(result)
        draws = per_example_losses(result, options.labels, options.samples, options.seed, numbers)
        device = model_device(self.of.model).type
        while True:
            with torch.enable_grad(), torch.autocast(device, enabled=False):
                losses = next(draws, None)
            if losses is None:
                return
            if losses.shape[0] != n:
                raise ValueError(
                    f"loss returned {counted(losses.shape[0], 'loss', 'losses')} for a batch of"
                    f" {counted(n, 'example')}; return one per example"
                )
            yield losses

    def _backward(self, losses: torch.Tensor, retain: bool) -> None:
        recorder, scale = self.recorder, self.of.options.loss_scale
        scaled = losses * scale if scale != 1.0 else losses
        looped = {
            name: self.of.targets.parameters[name]
            for name in recorder.parameters
            if name in recorder.looped
        }
        if looped:
            recorder.phase = "loop"
            for row in range(scaled.shape[0]):
                scaled[row].backward(retain_graph=True)  # type: ignore[no-untyped-call]
                for name, parameter in looped.items():
                    if parameter.grad is not None:
                        recorder.add_gradients(name, up(parameter.grad).unsqueeze(0) / scale, row)
                _clear(self.of.model)
        recorder.phase = "backward"
        scaled.sum().backward(retain_graph=retain)  # type: ignore[no-untyped-call]
        _clear(self.of.model)
        recorder.finish()

    def _probe(self, batch: Any) -> None:
        """Check every formula against autograd on the first batch's first example; where they
        differ, loop (S5).
        """
        recorder, targets = self.recorder, self.of.targets
        tried = [name for name in recorder.parameters if name not in recorder.looped]
        wanted = [targets.parameters[name] for name in tried]
        for parameter in wanted:
            parameter.requires_grad_(True)
        batch = to_device(batch, model_device(self.of.model))
        mask_of, n, _, _ = masks(batch, self.of.options.mask, self.of.options.loss_name)
        recorder.probing, recorder.phase = True, "forward"
        recorder.begin(n, mask_of)
        losses = next(self._losses(batch, n, range(n)))
        if losses.requires_grad and n:
            recorder.phase = "backward"
            (losses[0] * self.of.options.loss_scale).backward()  # type: ignore[no-untyped-call]
            recorder.finish()
        for name, parameter in zip(tried, wanted, strict=True):
            if not _agrees(parameter, recorder, name, self.of.options):
                recorder.looped.add(name)
            else:
                parameter.requires_grad_(False)
        recorder.end()
        recorder.probing = False
        recorder.probe_own.clear()
        recorder.probe_rest.clear()
        recorder.probe_scale.clear()
        _clear(self.of.model)

    def header(self, partial: bool = False) -> Header:
        options, targets = self.of.options, self.of.targets
        draws = self.examples * (options.samples if options.labels == "true" else 1)
        counts = {}
        for key in self.of.groups[self.number]:
            kind, _, name = key.partition("/")
            tokens = (
                self.recorder.tokens[name]
                if kind in ("input_gram", "output_grad_gram")
                else self.tokens
            )
            counts[key] = {
                "tokens": tokens,
                "examples": self.examples,
                "draws": 0 if kind == "input_gram" else draws,
            }
        entry = {
            "digest": self.digest,
            "batches": self.batches,
            "examples": self.examples,
            "tokens": self.tokens,
        }
        header: Header = {
            "software": f"pymerge {__version__}",
            "normalisation": "sum",
            "model": self.of.identity,
            "data": [entry],
            "settings": {
                "loss": options.loss_name if options.gradients else "",
                "labels": options.labels if options.gradients else "",
                "samples": options.samples,
            },
            "layers": {
                layer.name: {
                    "d_in": layer.d_in,
                    "d_out": layer.d_out,
                    "transposed": layer.transposed,
                    "weight": layer.weight,
                    **({"pool": layer.pool} if layer.pool else {}),
                }
                for layer in targets.layers.values()
            },
            "parameters": {name: list(p.shape) for name, p in targets.parameters.items()},
            "weights": self.of.weights,
            "tensors": counts,
            "aliases": dict(targets.aliases),
            "skipped": dict(targets.skipped),
        }
        if partial:
            header["progress"] = {
                "rows": self.rows,
                "seed": options.seed,
                "groups": len(self.of.groups),
            }
            header["progress"]["layer_tokens"] = dict(self.recorder.tokens)
        return header

    def packed(self) -> dict[str, torch.Tensor]:
        """The sums as they are stored: fp32 on the CPU, matrices as triangles."""
        return {
            key: pack(total.cpu()) if key.partition("/")[0] in PACKED else total.float().cpu()
            for key, total in self.recorder.sums.items()
        }

    def check_same(self, part: Statistics) -> None:
        own = self.header()
        if len(part.header["data"]) != 1:
            raise ValueError(f"{part.path} is no part of a run; delete the folder to start anew")
        for what in ("model", "settings", "layers", "parameters", "aliases"):
            if part.header[what] != own[what]:
                raise ValueError(
                    f"{part.path} was collected with another {what}; delete the folder to start"
                    " anew"
                )
        if list(part.header["tensors"]) != list(own["tensors"]):
            raise ValueError(
                f"{part.path} holds other layers than this pass would (another"
                f" {argument('memory_limit')}?); delete the folder to start anew"
            )
        progress = part.header.get("progress")
        if progress is not None and progress["seed"] != self.of.options.seed:
            raise ValueError(
                f"{part.path} was collected with {argument('seed', progress['seed'])}; pass the"
                " same"
            )

    def restore(self, part: Statistics) -> None:
        """Go on from an unfinished pass: its sums, its counts, and how many batches to skip."""
        self.check_same(part)
        for key, total in self.recorder.sums.items():
            stored = part._read(key)
            total.copy_(unpack(stored) if key.partition("/")[0] in PACKED else stored)
        entry, progress = part.header["data"][0], part.header.get("progress")
        if progress is None:
            raise ValueError(f"{part.path} is no unfinished pass; delete the folder to start anew")
        self.batches, self.examples, self.tokens = (
            entry["batches"],
            entry["examples"],
            entry["tokens"],
        )
        self.rows = progress["rows"]
        self.recorder.tokens.update(progress["layer_tokens"])
        self.to_skip, self.resumed = self.batches, entry["digest"]


def _parts_in(folder: Path) -> list[Path]:
    """What an interrupted run left in its folder; ValueError where that is something else, which
    would be in the way.
    """
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    foreign = [path.name for path in found if not _PART.fullmatch(path.name)]
    if foreign or (os.path.lexists(folder) and not folder.is_dir()):
        holds = f"holds {some_names(foreign)}" if foreign else "is not a folder"
        raise ValueError(
            f"{folder} is where unfinished parts go, and it {holds}; move that away, or give"
            f" another name for {argument('out')}"
        )
    return found


@contextmanager
def _gradients_off(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """No weight gradients but those that autograd itself must give: hooks have the rest from
    activations.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for name in recorder.looped:
        recorder.targets.parameters[name].requires_grad_(True)
    yield


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _agrees(parameter: nn.Parameter, recorder: Recorder, name: str, options: Options) -> bool:
    """Whether the formula gave autograd's gradient to the first example, and nothing to the
    others.
    """
    own = recorder.probe_own.get(name)
    rest = recorder.probe_rest.get(name)
    if parameter.grad is None:
        return own is None or float(own.abs().sum()) == 0
    truth = up(parameter.grad) / options.loss_scale
    if own is None or rest is None or own.shape != truth.shape:
        return float(truth.abs().max()) == 0 and own is None
    low = options.autocast is not None or torch.is_autocast_enabled(truth.device.type)
    tolerance = (
        _PROBE_TOLERANCE_LOW if low else _PROBE_TOLERANCE.get(parameter.dtype, _PROBE_TOLERANCE_LOW)
    )
    eps = torch.finfo(torch.bfloat16 if low else parameter.dtype).eps
    allowed = (
        tolerance * float(truth.norm()) + 4 * eps * recorder.probe_scale[name]
    )  # some gradients cancel to zero
    return float((own - truth).norm()) <= allowed and float(rest) ** 0.5 <= allowed


def forward_only(options: Options, model: nn.Module, batch: Any) -> None:
    if options.loss is not None:
        options.loss(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def autocast_of(options: Options, batch: Any, model: nn.Module) -> AbstractContextManager[Any]:
    return (
        nullcontext()
        if options.autocast is None
        else torch.autocast(model_device(model).type, options.autocast)
    )
