"""Hooks that add up one pass's sums while a model runs forward and backward (rules S3 to S6,
S9).
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from pymerge.messages.words import counted
from pymerge.statistics._convolutions import channels_last, unfolded
from pymerge.statistics._functional import watch_of
from pymerge.statistics._gradients import (
    Use,
    chunks,
    embedding_rows,
    gradients,
    has_formula,
    squares,
    up,
)
from pymerge.statistics._grams import add_gram, full_precision
from pymerge.statistics._products import Products
from pymerge.statistics._targets import Layer, Targets, convolution_shape

Phase = Literal["forward", "backward", "loop"]
MaskOf = Callable[[str], "torch.Tensor | None"]


@dataclass
class Role:
    """What a hooked module is there for. parameters: local name -> canonical name."""

    layer: Layer | None = None
    parameters: dict[str, str] = field(default_factory=dict)


class SharedInputs:
    """Recognises a layer's input when another layer reads the very same tensor (S3)."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], int, str]] = {}

    def leader(self, x: torch.Tensor, layer: str) -> str:
        """The layer that read `x` first since the batch began; `layer` itself where none did, and
        for inference tensors, which do not tell whether they were changed meanwhile.
        """
        if x.is_inference():
            return layer
        entry = self._seen.get(id(x))
        if entry is not None and entry[0]() is x and entry[1] == x._version:
            return entry[2]
        self._seen[id(x)] = (weakref.ref(x), x._version, layer)
        return layer

    def clear(self) -> None:
        self._seen.clear()


class Recorder:
    """The sums of `keys`, and the hooks that fill them.

    leaders: layer -> layer under which its input Gram is stored. gradients: whether there will be a
    backward pass. A driver sets `phase`, calls `begin` before a batch, `finish` after each backward
    pass and `end` after the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        keys: Collection[str],
        leaders: Mapping[str, str],
        gradients: bool,
        loss_scale: float = 1.0,
    ) -> None:
        self.phase: Phase = "forward"
        self.own_masks = False  # whether every layer is asked for its own
        self.probing = False
        self.looped: set[str] = set()
        self.targets = targets
        self.keys = set(keys)
        self.leaders = leaders
        self.gradients = gradients
        self.loss_scale = loss_scale
        self.sums = {key: self._zeros(key) for key in keys}
        self.tokens: Counter[str] = Counter()
        self.probe_own: dict[str, torch.Tensor] = {}
        self.probe_rest: dict[str, torch.Tensor] = {}
        self.probe_scale: dict[str, float] = defaultdict(float)
        self._roles = self._find_roles(model)
        self._watch = watch_of(model, targets, Products(self).called)
        self._handles: list[Any] = []
        self._shared = SharedInputs()
        self._n = 0
        self._mask_of: MaskOf = lambda name: None
        self._new_batch()

    @property
    def parameters(self) -> list[str]:
        """Canonical names of the parameters whose per-example gradients this pass needs."""
        names = (key.partition("/") for key in self.keys)
        return sorted(
            {name for kind, _, name in names if kind in ("diagonal_fisher", "block_fisher")}
        )

    @contextmanager
    def attached(self) -> Iterator[None]:
        """With the hooks on the model."""
        for module, role in self._roles.items():
            hook = partial(self._forward, role)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            with self._watch or nullcontext():
                yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def begin(self, n: int, mask_of: MaskOf) -> None:
        """A batch of n examples comes; mask_of gives a layer's (n, positions) mask or None."""
        self._n, self._mask_of = n, mask_of
        self._new_batch()

    def finish(self) -> None:
        """A backward pass is over: add what waited for all uses of a parameter."""
        for module, calls in self._without_grad.items():
            if self._arrived[module] < calls:
                raise RuntimeError(
                    f"{self._name(module)} ran without gradients and was not run again in the"
                    " backward pass; under reentrant checkpointing call"
                    " model.enable_input_require_grads(), or pass use_reentrant=False"
                )
        self._arrived.clear()
        for parameter, uses in self._deferred.items():
            with self.aside(uses[0][0].g.device):
                for row in range(self._n):
                    total = sum(gradients(use, local, row, row + 1) for use, local in uses)
                    assert isinstance(total, torch.Tensor)
                    self.add_gradients(parameter, total, row)
        self._deferred.clear()

    def end(self) -> None:
        """The batch is complete: its token counts become part of the result."""
        for layer, leader in self.leaders.items():
            if f"input_gram/{leader}" in self.keys and self._calls[layer] != self._calls[leader]:
                raise self._not_shared(layer, leader)
        if not self.probing:
            self.tokens.update(self.new_tokens)
        self._new_batch()

    def add_gradients(self, parameter: str, per_example: torch.Tensor, first: int) -> None:
        """Add per-example gradients (c, *shape) of the examples first, first + 1, … to the Fishers
        of a parameter.
        """
        if self.probing:
            own = per_example[0] if first == 0 else torch.zeros_like(per_example[0])
            rest = per_example[1:] if first == 0 else per_example
            self._add_probe(parameter, own, rest.square().sum())
            return
        diagonal = self.sums.get(f"diagonal_fisher/{parameter}")
        if diagonal is not None:
            diagonal += per_example.square().sum(0)  # S5: squared per example, then summed
        block = self.sums.get(f"block_fisher/{parameter}")
        if block is not None:
            vectors = per_example.reshape(per_example.shape[0], -1)
            block += vectors.T @ vectors  # S6

    def non_finite(self) -> list[str]:
        """Keys of the sums that are not finite."""
        flags: dict[torch.device, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, total in self.sums.items():
            part = total if key.startswith("diagonal_fisher/") else total.diagonal()
            flags[total.device][key] = part.sum().isfinite()
        bad = []
        for found in flags.values():
            good = torch.stack(list(found.values())).tolist()  # one synchronisation a device
            bad += [key for key, fine in zip(found, good, strict=True) if not fine]
        return bad

    @contextmanager
    def aside(self, device: torch.device) -> Iterator[None]:
        """In full precision, and with the hooks asleep: a formula may run a module once more."""
        phase, self.phase = self.phase, "loop"
        try:
            with full_precision(device):
                yield
        finally:
            self.phase = phase

    def _new_batch(self) -> None:
        self._shared.clear()
        self._calls: Counter[str] = Counter()
        self._uses: Counter[str] = Counter()
        self.new_tokens: Counter[str] = Counter()
        self._without_grad: Counter[nn.Module] = Counter()
        self._arrived: Counter[nn.Module] = Counter()
        self._deferred: dict[str, list[tuple[Use, str]]] = defaultdict(list)
        self._indices: dict[tuple[int, tuple[int, ...]], tuple[torch.Tensor, int]] = {}

    def _zeros(self, key: str) -> torch.Tensor:
        kind, _, name = key.partition("/")
        if kind in ("input_gram", "output_grad_gram"):
            layer = self.targets.layers[name]
            size = layer.d_in if kind == "input_gram" else layer.d_out
            return torch.zeros(size, size, dtype=torch.float64, device=layer.values.device)
        parameter = self.targets.parameters[name]
        shape = (parameter.numel(),) * 2 if kind == "block_fisher" else tuple(parameter.shape)
        return torch.zeros(shape, dtype=torch.float64, device=parameter.device)

    def _find_roles(self, model: nn.Module) -> dict[nn.Module, Role]:
        roles: dict[nn.Module, Role] = defaultdict(Role)
        for layer in self.targets.layers.values():
            leader = self.leaders.get(layer.name, layer.name)
            if f"input_gram/{leader}" in self.keys or f"output_grad_gram/{layer.name}" in self.keys:
                for module in layer.modules:
                    roles[module].layer = layer
        for parameter in self.parameters:
            tensor = self.targets.parameters[parameter]
            if not all(has_formula(owner) for owner in self.targets.owners[parameter]):
                self.looped.add(parameter)
                continue
            for owner in self.targets.owners[parameter]:
                for local, value in owner._parameters.items():
                    if value is tensor:
                        roles[owner].parameters[local] = parameter
        if self.gradients:
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    _ = roles[module]  # hooked so that gradients reach what follows it
        return dict(roles)

    def _name(self, module: nn.Module) -> str:
        role = self._roles[module]
        return (
            role.layer.name
            if role.layer
            else next(iter(role.parameters.values()), type(module).__name__)
        )

    def _wanted(self, role: Role) -> dict[str, str]:
        return {local: name for local, name in role.parameters.items() if name not in self.looped}

    def _forward(
        self,
        role: Role,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> torch.Tensor | None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        if x is not None and x.is_nested:
            raise ValueError(
                f"{self._name(module)} saw a nested tensor, whose examples have positions of their"
                " own number; pass enable_nested_tensor=False to the torch.nn.TransformerEncoder,"
                " or pad the batch"
            )
        if self.phase == "forward" and x is not None:
            self._uses.update(role.parameters.values())
            if role.layer is not None:
                self._input(role.layer, module, x)
        if (
            not self.gradients
            or not isinstance(output, torch.Tensor)
            or not output.is_floating_point()
        ):
            return None
        parameters = self._wanted(role)
        target = bool(parameters) or (
            role.layer is not None and f"output_grad_gram/{role.layer.name}" in self.keys
        )
        if not torch.is_grad_enabled():
            if self.phase == "forward" and target:
                self._without_grad[module] += 1
            return None
        changed = False
        if (
            parameters
            and isinstance(module, nn.Embedding)
            and x is not None
            and x.shape[0] == 1 < self._n
        ):
            # Positions that all examples share: one gradient row per example instead of their sum.
            x, changed = x.expand(self._n, *x.shape[1:]), True
            output = output.expand(self._n, *output.shape[1:])
        if not output.requires_grad:
            output, changed = output.requires_grad_().clone(), True
        if target:
            kept = x if parameters and has_formula(module, len(args) + len(kwargs)) else None
            output.register_hook(partial(self._gradient, role, module, kept))
        return output if changed else None

    def _input(self, layer: Layer, module: nn.Module, x: torch.Tensor) -> None:
        self._calls[layer.name] += 1
        leader = self.leaders.get(layer.name, layer.name)
        windows = convolution_shape(module) is not None
        x = unfolded(module, x) if windows else x
        index, count = self.positions(layer.name, x.shape)
        self.new_tokens[layer.name] += count
        if f"input_gram/{leader}" not in self.keys:
            return
        first = layer.name if windows else self._shared.leader(x, layer.name)
        if leader != layer.name:
            if first != leader:
                raise self._not_shared(layer.name, leader)
        elif not self.probing:
            with full_precision(x.device):
                add_gram(self.sums[f"input_gram/{leader}"], x.reshape(-1, layer.d_in), index)

    def _gradient(
        self, role: Role, module: nn.Module, x: torch.Tensor | None, g: torch.Tensor
    ) -> None:
        if self.phase != "backward":
            return
        self._arrived[module] += 1
        with self.aside(g.device):
            layer = role.layer
            key = "" if layer is None else f"output_grad_gram/{layer.name}"
            if layer is not None and key in self.keys and not self.probing:
                own = g if convolution_shape(module) is None else channels_last(module, g)
                index, _ = self.positions(layer.name, own.shape)
                add_gram(self.sums[key], own.reshape(-1, layer.d_out), index, 1 / self.loss_scale)
            parameters = self._wanted(role)
            if not parameters:
                return
            use = self._use(module, parameters, x, g)
            for local, name in parameters.items():
                if self.probing and use is not None:
                    self.probe_scale[name] += _scale(use)
                if use is None:
                    self._misaligned(name, x, g)
                elif self._uses[name] > 1:
                    self._deferred[name].append((use, local))
                elif isinstance(module, nn.Embedding) and self._only_diagonal(name):
                    self._add_embedding(name, module, use)
                else:
                    squared = self._only_diagonal(name)
                    for low, high in chunks(use, local, whole=not squared):
                        if squared:
                            self.sums[f"diagonal_fisher/{name}"] += squares(use, local, low, high)
                        else:
                            self.add_gradients(name, gradients(use, local, low, high), low)

    def _use(
        self,
        module: nn.Module,
        parameters: Mapping[str, str],
        x: torch.Tensor | None,
        g: torch.Tensor,
    ) -> Use | None:
        """The call with examples first; None where they cannot be told apart."""
        if x is None:
            return None
        g = up(g) / self.loss_scale
        if x.shape[0] != self._n or g.shape[0] != self._n:
            mask = self._mask_of(self._name(module))
            flat = mask is not None and x.shape[0] == g.shape[0] == mask.numel() and g.dim() == 2
            if not flat:
                return None
            x, g = x.reshape(self._n, -1, *x.shape[1:]), g.reshape(self._n, -1, *g.shape[1:])
        return Use(module, parameters, x, g)

    def _misaligned(self, parameter: str, x: torch.Tensor | None, g: torch.Tensor) -> None:
        if self.probing:
            one = torch.ones((), dtype=torch.float32, device="cpu")
            self._add_probe(parameter, one * 0, one * torch.inf)
            return
        shape = None if x is None else tuple(x.shape)
        raise ValueError(
            f"the examples of {parameter} cannot be told apart (input {shape}, gradient"
            f" {tuple(g.shape)}, {counted(self._n, 'example')}), and the first batch did not show"
            " it; put a batch of several examples first"
        )

    def _add_probe(self, parameter: str, own: torch.Tensor, rest: torch.Tensor) -> None:
        if parameter in self.probe_own:
            self.probe_own[parameter] = self.probe_own[parameter] + own
            self.probe_rest[parameter] = self.probe_rest[parameter] + rest
        else:
            self.probe_own[parameter], self.probe_rest[parameter] = own, rest

    def _add_embedding(self, parameter: str, module: nn.Embedding, use: Use) -> None:
        diagonal = self.sums[f"diagonal_fisher/{parameter}"]
        for row in range(self._n):
            ids, rows = embedding_rows(module, use.x[row], use.g[row])
            diagonal.index_add_(0, ids, rows.square().to(diagonal.dtype))

    def _only_diagonal(self, parameter: str) -> bool:
        return not self.probing and f"block_fisher/{parameter}" not in self.keys

    def positions(self, name: str, shape: torch.Size) -> tuple[torch.Tensor | None, int]:
        """Row numbers of the unmasked positions of a (…, d) tensor, None for all, and how many they
        are (S3).
        """
        lead = shape[:-1]
        whole = mask = self._mask_of(name)
        if whole is None or mask is None:
            return None, lead.numel()
        if self._watch is not None and ".experts." in f".{name}.":
            rows = self._watch.rows
            if rows is not None and (rows.numel(), self._watch.gathered_from) == (
                lead.numel(),
                mask.numel(),
            ):
                index = mask.reshape(-1)[rows.to(mask.device)].nonzero().squeeze(1)
                return index, index.numel()
        if len(lead) == 1 and lead[0] == mask.shape[0] and lead[0] != mask.numel():
            mask = mask.any(1)  # one row per example, as in a pooler
        elif lead[: mask.dim()] == mask.shape:
            mask = mask.reshape(*mask.shape, *[1] * (len(lead) - mask.dim())).expand(lead)
        elif not (len(lead) == 1 and lead[0] == mask.numel()):
            if self.own_masks:
                raise ValueError(
                    f"{name} saw a tensor of shape {tuple(shape)}, which does not line up with the"
                    f" mask {tuple(mask.shape)} that mask= returned for it; return one that does,"
                    " or None to count every position"
                )
            return None, lead.numel()  # of other positions: images, those that examples share
        key = (id(whole), tuple(lead))
        if key not in self._indices:
            index = mask.reshape(-1).nonzero().squeeze(1)
            self._indices[key] = index, index.numel()
        index, count = self._indices[key]
        return (None if count == lead.numel() else index), count

    def _not_shared(self, layer: str, leader: str) -> RuntimeError:
        return RuntimeError(
            f"{layer} read the same input as {leader} in the first batch and another one later;"
            " pass share_inputs=False"
        )


def _scale(use: Use) -> float:
    """How large the terms are whose sum is a gradient, for judging its rounding error."""
    x = up(use.x) if use.x.is_floating_point() else torch.ones_like(use.x, dtype=torch.float32)
    positions = use.g[0, ..., 0].numel()
    return float(use.g.norm()) * max(float(x.norm()), math.sqrt(positions))
