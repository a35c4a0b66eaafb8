"""`collect`: run a model over batches and add up its statistics, in as many passes as memory asks for (rules S1 to S9)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pymerge import __version__
from pymerge.statistics._file import (
    KINDS,
    PACKED,
    Header,
    Statistics,
    in_memory,
    merge_files,
    pack,
    unpack,
    write,
)
from pymerge.statistics._file import load as load_file
from pymerge.statistics._gradients import up
from pymerge.statistics._hooks import MaskOf, Recorder, SharedInputs
from pymerge.statistics._loss import LABELS, Loss, named_loss, per_example_losses
from pymerge.statistics._targets import NameFilter, Targets, find_targets, name_filter, plan_passes

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
Mask = str | Callable[[Any, str], "torch.Tensor | None"] | None

_GRADIENT_KINDS = ("output_grad_gram", "diagonal_fisher", "block_fisher")
_FINGERPRINT_ELEMENTS = 1 << 14
# How far a formula's gradient may be from autograd's before the formula is dropped for one backward pass per example.
_PROBE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_PROBE_TOLERANCE_LOW = 5e-2


@dataclass(frozen=True)
class Progress:
    """Where a collection stands: pass `number` of `passes`, and what that pass has read so far."""

    number: int
    passes: int
    batches: int
    examples: int
    tokens: int


@dataclass(frozen=True)
class _Options:
    kinds: tuple[str, ...]
    loss: Loss | None
    loss_name: str
    labels: str
    samples: int
    seed: int
    mask: Mask
    max_tokens: int | None
    autocast: torch.dtype | None
    loss_scale: float
    checkpoint_every: int | None
    progress: Callable[[Progress], None] | None

    @property
    def gradients(self) -> bool:
        return any(kind in _GRADIENT_KINDS for kind in self.kinds)


def collect(
    model: nn.Module,
    batches: Batches,
    *,
    loss: str | Loss | None = None,
    kinds: Sequence[str] = ("input_gram", "output_grad_gram"),
    layers: NameFilter = None,
    parameters: NameFilter = None,
    labels: str = "true",
    samples: int = 1,
    seed: int = 0,
    mask: Mask = "attention_mask",
    max_tokens: int | None = None,
    max_dim: int = 32768,
    memory_limit: int | None = None,
    share_inputs: bool = True,
    autocast: torch.dtype | None = None,
    loss_scale: float = 1.0,
    eval_mode: bool = True,
    out: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    model_name: str = "",
    rename: Callable[[str], str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Statistics:
    """Run `model` over `batches` and add up the statistics that merging by MaTS, RegMean or Fisher needs.

    With x the input and g the gradient at the output of a linear layer at one unmasked position, and v_n the
    gradient of example n's loss by a parameter (rules S3 to S6 of docs/spec/statistics.md):

        input_gram        sum x x^T            (d_in, d_in)   per linear layer (Linear, Conv1D)
        output_grad_gram  sum g g^T            (d_out, d_out) per linear layer
        diagonal_fisher   sum_n v_n * v_n      its shape      per parameter
        block_fisher      sum_n v_n v_n^T      (d, d)         per vector parameter

    batches: mappings, tuples or tensors with the examples in the leading dimension, moved to the model's device. An iterable that can be read
        again, or a function that returns one; a plain iterator serves for one pass without probing.
    loss: one of "causal-lm", "masked-lm", "token-classification", "sequence-classification", "embedding", or a
        function (model, batch) that returns a `Prediction`, or per-example losses (n,). Not needed for input_gram alone.
    layers: globs or a function over module names: whose Gram matrices and parameters are collected. A glob may
        match a whole name or its end. parameters: the same over parameter names, for the Fishers.
    labels: "true" draws `samples` labels per prediction from the model; "exact" takes the expectation over all classes (one backward
        pass per class); "empirical" takes the batch's labels. The draws depend on `seed` and the example's number alone.
    mask: name of the batch's (n, positions) mask, a function (batch, layer name) -> mask, or None to count every position.
    max_tokens: stop after the batch that reaches so many unmasked positions.
    max_dim: matrices of a larger dimension are left out, with a note in the header.
    memory_limit: bytes for the fp64 accumulators; where they do not fit, groups of layers take a pass each.
    share_inputs: keep one input Gram for layers that read the same tensor (q, k and v; gate and up).
    autocast: run the model under autocast of this dtype. loss_scale: multiplies the loss in the backward pass and is taken out of the
        gradients again, against underflow in fp16.
    eval_mode: put the model into eval mode meanwhile. transformers checkpoints activations in training mode only.
    out: write a statistics file and return a reader of it. checkpoint_every: write what there is every so many
        batches, beside `out`; `resume=True` continues from there.
    rename: from the names of modules and parameters to those that the statistics, and `layers`, shall use.

    Returns `Statistics`. Raises ValueError and TypeError for arguments that make no sense, RuntimeError where gradients do
    not reach a layer, FloatingPointError where a batch gives NaN or infinity. The model comes back as it was.
    """
    options = _checked_options(
        kinds,
        loss,
        labels,
        samples,
        seed,
        mask,
        max_tokens,
        autocast,
        loss_scale,
        checkpoint_every,
        progress,
    )
    if checkpoint_every is not None and out is None:
        raise ValueError("checkpoint_every needs out=, the file to write beside")
    targets = find_targets(
        model,
        rename or str,
        options.kinds,
        name_filter("layers", layers),
        name_filter("parameters", parameters),
        max_dim,
    )
    if not targets.keys:
        raise ValueError(
            f"nothing to collect: no layer or parameter of the {type(model).__name__} fits kinds={tuple(kinds)}, "
            f"layers={layers!r}, parameters={parameters!r}"
            + (f"; {len(targets.skipped)} are above max_dim={max_dim}" if targets.skipped else "")
        )
    source = _Source(batches)
    with _prepared(model, eval_mode):
        leaders: dict[str, str] = {}
        if share_inputs and "input_gram" in options.kinds:
            leaders = _find_leaders(model, targets, source.first(), options)
        for layer, leader in leaders.items():
            del targets.keys[f"input_gram/{layer}"]
            for alias, key in list(targets.aliases.items()):
                if key == f"input_gram/{layer}":
                    targets.aliases[alias] = f"input_gram/{leader}"
            targets.aliases[f"input_gram/{layer}"] = f"input_gram/{leader}"
        groups = plan_passes(targets, memory_limit)
        if len(groups) > 1 and not source.repeatable:
            raise ValueError(
                f"memory_limit={memory_limit} asks for {len(groups)} passes, but batches is an iterator that can be read once; "
                "pass a list, a DataLoader, or a function that returns an iterator"
            )
        run = _Run(model, targets, leaders, options, source, groups, model_name)
        return run.in_memory() if out is None else run.to_file(Path(out), resume)


class _Run:
    """The passes of one collection and what becomes of their results."""

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        leaders: Mapping[str, str],
        options: _Options,
        source: _Source,
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
        self.digest: str | None = None

    def in_memory(self) -> Statistics:
        tensors: dict[str, torch.Tensor] = {}
        header: Header | None = None
        for number in range(len(self.groups)):
            one_pass = _Pass(self, number)
            one_pass.run()
            tensors.update(one_pass.packed())
            own = one_pass.header()
            if header is None:
                header = own
            else:
                header["tensors"].update(own["tensors"])
        assert header is not None
        return in_memory(header, tensors)

    def to_file(self, out: Path, resume: bool) -> Statistics:
        folder = out.with_name(out.name + ".parts")
        if folder.exists() and any(folder.iterdir()) and not resume:
            raise ValueError(
                f"{folder} holds what an interrupted run collected; pass resume=True to go on from it, or delete it"
            )
        parts = []
        for number in range(len(self.groups)):
            part = folder / f"pass-{number:04d}.safetensors"
            unfinished = folder / f"pass-{number:04d}.partial.safetensors"
            one_pass = _Pass(self, number)
            if part.exists():
                one_pass.check_same(load_file(part))
                self.check_digest(load_file(part).header["data"][0]["digest"])
            else:
                if unfinished.exists():
                    one_pass.restore(load_file(unfinished))
                one_pass.checkpoint = unfinished if self.options.checkpoint_every else None
                one_pass.run()
                last = len(self.groups) == 1
                write(out if last else part, one_pass.header(), one_pass.packed().items())
                unfinished.unlink(missing_ok=True)
            parts.append(part)
        if len(self.groups) > 1:
            merge_files(parts, out)
        for part in parts:
            part.unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()
        return load_file(out)

    def check_digest(self, digest: str) -> None:
        """All passes must read the same batches."""
        if self.digest is not None and digest != self.digest:
            raise ValueError(
                "batches differ from one pass to the next; switch shuffling off, or raise memory_limit to need one pass"
            )
        self.digest = digest


class _Pass:
    """One group of sums: a run over all batches."""

    def __init__(self, run: _Run, number: int) -> None:
        self.of, self.number = run, number
        kinds = {key.partition("/")[0] for key in run.groups[number]}
        self.gradients = any(kind in _GRADIENT_KINDS for kind in kinds)
        self.recorder = Recorder(
            run.model,
            run.targets,
            run.groups[number],
            run.leaders,
            self.gradients,
            run.options.loss_scale,
        )
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
                        f"batch {self.batches - 1} gives NaN or infinity in {len(bad)} sums, the first {bad[0]}; "
                        "look for infinite activations or, in fp16, for a loss_scale that overflows"
                    )
                every = options.checkpoint_every
                if self.checkpoint is not None and every and self.batches % every == 0:
                    write(self.checkpoint, self.header(partial=True), self.packed().items())
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
        batch = to_device(batch, _device(self.of.model))
        mask_of, n, counted, tokens = _masks(batch, options.mask)
        if n == 0:
            return
        recorder.phase = "forward"
        recorder.begin(n, mask_of)
        if not self.gradients:
            with torch.no_grad(), _autocast(options, batch, self.of.model):
                _forward_only(options, self.of.model, batch)
        else:
            draws = self._losses(batch, n, self.rows)
            for number, losses in enumerate(draws):
                last = number == len(draws) - 1
                if losses.requires_grad:
                    self._backward(losses, retain=not last)
        recorder.end()
        self.rows += n
        self.examples += counted
        self.tokens += tokens

    def _losses(self, batch: Any, n: int, first: int) -> list[torch.Tensor]:
        options = self.of.options
        assert options.loss is not None
        with torch.enable_grad(), _autocast(options, batch, self.of.model):
            result = options.loss(self.of.model, batch)
        with torch.enable_grad(), torch.autocast(_device(self.of.model).type, enabled=False):
            draws = list(
                per_example_losses(result, options.labels, options.samples, options.seed, first)
            )
        for losses in draws:
            if losses.shape[0] != n:
                raise ValueError(
                    f"loss returned {losses.shape[0]} losses for a batch of {n} examples; return one per example"
                )
        return draws

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
        """Check every formula against autograd on the first batch's first example; where they differ, loop (S5)."""
        recorder, targets = self.recorder, self.of.targets
        tried = [name for name in recorder.parameters if name not in recorder.looped]
        wanted = [targets.parameters[name] for name in tried]
        for parameter in wanted:
            parameter.requires_grad_(True)
        batch = to_device(batch, _device(self.of.model))
        mask_of, n, _, _ = _masks(batch, self.of.options.mask)
        recorder.probing, recorder.phase = True, "forward"
        recorder.begin(n, mask_of)
        losses = self._losses(batch, n, 0)[0]
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
                }
                for layer in targets.layers.values()
            },
            "parameters": {name: list(p.shape) for name, p in targets.parameters.items()},
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
        for what in ("model", "settings", "layers", "aliases"):
            if part.header[what] != own[what]:
                raise ValueError(
                    f"{part.path} was collected with another {what}; delete the folder to start anew"
                )
        if list(part.header["tensors"]) != list(own["tensors"]):
            raise ValueError(
                f"{part.path} holds other layers than this pass would (another memory_limit?); delete the folder to start anew"
            )

    def restore(self, part: Statistics) -> None:
        """Go on from an unfinished pass: its sums, its counts, and how many batches to skip."""
        self.check_same(part)
        for key, total in self.recorder.sums.items():
            stored = part._read(key)
            total.copy_(unpack(stored) if key.partition("/")[0] in PACKED else stored)
        entry, progress = part.header["data"][0], part.header["progress"]
        if progress["seed"] != self.of.options.seed:
            raise ValueError(
                f"{part.path} was collected with seed={progress['seed']}; pass the same"
            )
        self.batches, self.examples, self.tokens = (
            entry["batches"],
            entry["examples"],
            entry["tokens"],
        )
        self.rows = progress["rows"]
        self.recorder.tokens.update(progress["layer_tokens"])
        self.to_skip, self.resumed = self.batches, entry["digest"]


class _Source:
    """Batches that may be read several times, and a look at the first."""

    def __init__(self, batches: Batches) -> None:
        self._make = batches if callable(batches) and not isinstance(batches, Iterable) else None
        self._given = batches
        self.repeatable = self._make is not None or iter(batches) is not batches  # type: ignore[arg-type]
        self._peeked: list[Any] = []
        self._iterator: Iterator[Any] | None = None

    def first(self) -> Any:
        if not self._peeked:
            iterator = self._fresh()
            for batch in iterator:
                self._peeked.append(batch)
                break
            else:
                raise ValueError("batches is empty; pass at least one batch")
            self._iterator = iterator
        return self._peeked[0]

    def all(self) -> Iterator[Any]:
        if self.repeatable:
            yield from self._fresh()
            return
        yield self.first()
        assert self._iterator is not None
        yield from self._iterator

    def _fresh(self) -> Iterator[Any]:
        made = self._make() if self._make is not None else self._given
        return iter(made)  # type: ignore[arg-type]


def _checked_options(
    kinds: Sequence[str],
    loss: str | Loss | None,
    labels: str,
    samples: int,
    seed: int,
    mask: Mask,
    max_tokens: int | None,
    autocast: torch.dtype | None,
    loss_scale: float,
    checkpoint_every: int | None,
    progress: Callable[[Progress], None] | None,
) -> _Options:
    if isinstance(kinds, str):
        kinds = (kinds,)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds has {kind!r}; allowed are {', '.join(map(repr, KINDS))}")
    if not kinds:
        raise ValueError(f"kinds is empty; pass some of {', '.join(map(repr, KINDS))}")
    if labels not in LABELS:
        raise ValueError(f"labels={labels!r} is not one of {', '.join(map(repr, LABELS))}")
    for name, value in (
        ("samples", samples),
        ("max_tokens", max_tokens),
        ("checkpoint_every", checkpoint_every),
    ):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ValueError(f"{name}={value!r} is not a positive integer")
    if not loss_scale > 0:
        raise ValueError(f"loss_scale={loss_scale} is not positive")
    if loss is None and any(kind in _GRADIENT_KINDS for kind in kinds):
        raise ValueError(
            f"kinds={tuple(kinds)} needs gradients, hence a loss; pass loss=, or kinds=('input_gram',) alone"
        )
    name = (
        loss
        if isinstance(loss, str)
        else getattr(loss, "__qualname__", type(loss).__name__)
        if loss
        else ""
    )
    return _Options(
        kinds=tuple(dict.fromkeys(kinds)),
        loss=named_loss(loss) if isinstance(loss, str) else loss,
        loss_name=name,
        labels=labels,
        samples=samples,
        seed=seed,
        mask=mask,
        max_tokens=max_tokens,
        autocast=autocast,
        loss_scale=loss_scale,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )


@contextmanager
def _prepared(model: nn.Module, eval_mode: bool) -> Iterator[None]:
    """The model in eval mode; its modes, requires_grad flags and gradients restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    states = {
        parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    }
    if eval_mode:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, (flag, grad) in states.items():
            parameter.requires_grad_(flag)
            parameter.grad = grad


@contextmanager
def _gradients_off(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """No weight gradients but those that autograd itself must give: hooks have the rest from activations."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for name in recorder.looped:
        recorder.targets.parameters[name].requires_grad_(True)
    yield


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _agrees(parameter: nn.Parameter, recorder: Recorder, name: str, options: _Options) -> bool:
    """Whether the formula gave autograd's gradient to the first example, and nothing to the others."""
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


def _find_leaders(
    model: nn.Module, targets: Targets, batch: Any, options: _Options
) -> dict[str, str]:
    """Which layers read the same input tensor as an earlier one, by one forward pass over the first batch."""
    shared = SharedInputs()
    calls: dict[str, list[str]] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
            if x is not None:
                calls.setdefault(name, []).append(shared.leader(x, name))

        return hook

    for name, layer in targets.layers.items():
        if f"input_gram/{name}" in targets.keys:
            for module in layer.modules:
                handles.append(module.register_forward_pre_hook(watch(name), with_kwargs=True))
    try:
        batch = to_device(batch, _device(model))
        with torch.no_grad(), _autocast(options, batch, model):
            _forward_only(options, model, batch)
    finally:
        for handle in handles:
            handle.remove()
    leaders = {}
    for name, seen in calls.items():
        leader = seen[0]
        if leader != name and set(seen) == {leader} and calls[leader] == [leader] * len(seen):
            if targets.layers[leader].d_in == targets.layers[name].d_in:
                leaders[name] = leader
    return leaders


def _forward_only(options: _Options, model: nn.Module, batch: Any) -> None:
    if options.loss is not None:
        options.loss(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def _masks(batch: Any, mask: Mask) -> tuple[MaskOf, int, int, int]:
    """(a layer's boolean mask, examples in the batch, those with an unmasked position, unmasked positions)."""
    n = _examples(batch)
    if mask is None or (
        isinstance(mask, str) and not (isinstance(batch, Mapping) and batch.get(mask) is not None)
    ):
        return (lambda name: None), n, n, n
    if isinstance(mask, str):
        given = batch[mask]
        if given.dim() != 2:
            raise ValueError(
                f"the batch's {mask} has shape {tuple(given.shape)}; expected (n, positions). "
                "For other masks pass mask=a function (batch, layer) -> (n, positions)"
            )
        one = given != 0
        return (lambda name: one), n, int(one.any(1).sum()), int(one.sum())
    found: dict[str, torch.Tensor | None] = {}
    function = mask

    def mask_of(name: str) -> torch.Tensor | None:
        if name not in found:
            value = function(batch, name)
            found[name] = None if value is None else value != 0
        return found[name]

    return mask_of, n, n, n


def _examples(batch: Any) -> int:
    """The size of the leading dimension of the batch's first tensor."""
    values = (
        batch.values()
        if isinstance(batch, Mapping)
        else batch
        if isinstance(batch, (tuple, list))
        else (batch,)
    )
    for value in values:
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    raise TypeError(
        f"a batch is a {type(batch).__name__} without tensors; pass mappings, tuples or lists of tensors, or tensors"
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _autocast(options: _Options, batch: Any, model: nn.Module) -> AbstractContextManager[Any]:
    return (
        nullcontext()
        if options.autocast is None
        else torch.autocast(_device(model).type, options.autocast)
    )


def batch_digest(previous: str, batch: Any) -> str:
    """A hash chain over batches: of the digest before and of all tensors, numbers and strings in this batch."""
    state = hashlib.blake2b(previous.encode(), digest_size=16)

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            state.update(f"{value.dtype}{tuple(value.shape)}".encode())
            state.update(
                value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            )
        elif isinstance(value, Mapping):
            for name in value:
                state.update(str(name).encode())
                feed(value[name])
        elif isinstance(value, (tuple, list)):
            for each in value:
                feed(each)
        elif isinstance(value, (str, int, float)):
            state.update(repr(value).encode())

    feed(batch)
    return state.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes, dtypes and up to 16384 evenly spaced elements of every parameter and buffer."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        flat = flat[:: max(1, flat.numel() // _FINGERPRINT_ELEMENTS)].contiguous().cpu()
        if flat.numel():
            state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()
