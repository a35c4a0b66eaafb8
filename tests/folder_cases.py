"""Small model folders for tests, and what the reference says a merge of them is."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pymerge.checkpoint.types import ModelHeader, TensorInfo
from pymerge.engine.merge import _merge, _recipe, merge_checkpoints
from pymerge.engine.sizes import Sizes
from pymerge.engine.summary import MergeSummary
from pymerge.interrupt import Uninterrupted
from pymerge.planning.planner import build_plan
from pymerge.reference.ties import select as reference_select
from pymerge.reference.ties import ties as reference_ties

State = dict[str, torch.Tensor]

SHAPES = {
    "model.embed_tokens.weight": (37, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.mlp.up_proj.weight": (24, 16),
    "model.layers.1.input_layernorm.weight": (16,),
    "model.norm.weight": (16,),
    "lm_head.weight": (37, 16),
}
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def family(count: int = 2, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[State]:
    """A base and `count` fine-tuned state dicts."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    models = [base]
    for _ in range(count):
        models.append(
            {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        )
    return [{name: t.to(dtype) for name, t in model.items()} for model in models]


def write_model(
    folder: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any] = CONFIG
) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_family(root: Path, count: int = 2, dtype: torch.dtype = torch.bfloat16) -> list[Path]:
    """Folders base, m1, m2, ..."""
    names = ["base", *(f"m{k}" for k in range(1, count + 1))]
    return [write_model(root / n, s) for n, s in zip(names, family(count, dtype), strict=True)]


def write_sharded(folder: Path, state: State, parts: int = 3) -> Path:
    folder.mkdir(parents=True)
    names = list(state)
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        held = {name: state[name] for name in names[part::parts]}
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def recipe(method: str, folders: list[Path], **parameters: Any) -> dict[str, Any]:
    """A configuration that merges folders[1:] on folders[0] (linear has no base)."""
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders[1:]],
    }
    if method != "linear":
        config["base_model"] = str(folders[0])
    if parameters:
        config["parameters"] = parameters
    return config


def merge_in(sizes: Sizes, config: Any, out: Path, **options: Any) -> MergeSummary:
    """`merge_checkpoints` with buffers and parts of other sizes."""
    named = inspect.signature(merge_checkpoints).parameters.items()
    plain = {name: each.default for name, each in named if each.default is not each.empty}
    work = functools.partial(_merge, config, out, **{**plain, **options}, published=[], sizes=sizes)
    return Uninterrupted(work).run()


def read_result(folder: Path) -> State:
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def expected(config: Any, states: list[State], **options: Any) -> State:
    """The merge of `config` by pymerge.reference, tensor by tensor from the same plan; states in
    its models' order.
    """
    made, _ = _recipe(config, options.get("seed", 0), True)
    headers = [
        ModelHeader(
            name,
            {
                n: TensorInfo(n, str(t.dtype).removeprefix("torch."), tuple(t.shape))
                for n, t in s.items()
            },
            CONFIG,
        )
        for name, s in zip(made.models, states, strict=True)
    ]
    plan = build_plan(made, headers)
    assert not plan.problems
    result = {}
    scoped = [t for t in plan.tensors if t.options is not None and t.options.scope == "model"]
    known: dict[str, Any] = {}
    if scoped and scoped[0].options is not None:
        whole = scoped[0].options.rule(sum(t.elements for t in scoped))
        segments = [
            (
                [states[s.model][s.tensor] for s in t.sources],
                None if t.base is None else states[t.base.model][t.base.tensor],
            )
            for t in scoped
        ]
        known = {"ranks": whole.ranks, "dropped": whole.dropped}
        known["thresholds"] = tuple(reference_select(segments, whole.ranks))
        if whole.trim == "outliers":
            known["bounds"] = tuple(
                _nth_largest(segments, k, drop + 1) for k, drop in enumerate(whole.dropped)
            )
    for majority in (1, -1):
        balance = 0
        for tensor in plan.tensors:
            sources = [states[s.model][s.tensor] for s in tensor.sources]
            if tensor.options is None:
                result[tensor.name] = sources[0].clone()
                continue
            base = None if tensor.base is None else states[tensor.base.model][tensor.base.tensor]
            out = torch.full(tensor.shape, torch.nan, dtype=getattr(torch, tensor.dtype))
            rule = tensor.options.rule(tensor.elements, tensor.key_name)
            if known:
                rule = rule.with_precomputed(majority=majority, **known)
            stats = reference_ties(sources, base, rule, out)
            balance += stats.positive - stats.negative
            result[tensor.name] = out
        if not known or balance > 0:
            break
    return result


def _nth_largest(segments: Sequence[Any], k: int, rank: int) -> float:
    deltas = [
        models[k].float() - (0 if base is None else base.float()) for models, base in segments
    ]
    return float(torch.cat([d.abs().reshape(-1) for d in deltas]).sort().values[-rank])


def assert_same(actual: State, wanted: State, *, payloads: bool = False) -> None:
    """Names, dtypes, shapes and bits; which NaN it is, only with `payloads`."""
    assert sorted(actual) == sorted(wanted)
    for name, tensor in wanted.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        one, other = actual[name].reshape(-1), tensor.reshape(-1)
        if tensor.is_floating_point() and not payloads:
            assert torch.equal(one.isnan(), other.isnan()), name
            one, other = one[~one.isnan()], other[~other.isnan()]
        assert torch.equal(
            one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
        ), name
