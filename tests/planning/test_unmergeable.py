"""What no arithmetic of elements can merge is refused by names, shapes and dtypes, from both doors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import CONFIG, State, family, recipe, write_model

import pymerge
from pymerge.checkpoint.types import ModelHeader, TensorInfo
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import MismatchError
from pymerge.planning.unmergeable import declared, is_quantised, why_unmergeable

I32, U8, I8 = torch.int32, torch.uint8, torch.int8
F8 = torch.float8_e4m3fn
Q = "model.layers.0.self_attn.q_proj"


def codes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.uint8).to(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


# What tools write in the place of `q_proj.weight`.
QUANTISED: dict[str, State] = {
    "gptq": {
        f"{Q}.qweight": codes(I32, 2, 16),
        f"{Q}.qzeros": codes(I32, 1, 2),
        f"{Q}.scales": scales(1, 16),
        f"{Q}.g_idx": codes(I32, 16),
    },
    "marlin": {f"{Q}.B": codes(I32, 1, 32), f"{Q}.s": scales(1, 16)},
    "integers alone": {f"{Q}.weight": codes(I8, 16, 16)},
    "awq": {f"{Q}.qweight": codes(I32, 16, 2), f"{Q}.scales": scales(1, 16)},
    "exl2": {f"{Q}.q_weight": codes(I32, 2, 16), f"{Q}.q_scale": codes(I32, 1, 2)},
    "exl3": {
        f"{Q}.trellis": codes(torch.int16, 1, 1, 64),
        f"{Q}.suh": scales(16),
        f"{Q}.svh": scales(16),
    },
    "bitsandbytes 4 bits": {
        f"{Q}.weight": codes(U8, 128, 1),
        f"{Q}.weight.absmax": codes(U8, 4),
        f"{Q}.weight.quant_map": scales(16, dtype=torch.float32),
        f"{Q}.weight.quant_state.bitsandbytes__nf4": codes(U8, 90),
    },
    "bitsandbytes 8 bits": {f"{Q}.weight": codes(I8, 16, 16), f"{Q}.SCB": scales(16)},
    "fp8 by blocks": {f"{Q}.weight": codes(F8, 16, 16), f"{Q}.weight_scale_inv": scales(1, 1)},
    "fp8 by tensor": {f"{Q}.weight": codes(F8, 16, 16), f"{Q}.weight_scale": scales()},
    "scaled fp8 of ComfyUI": {f"{Q}.weight": codes(F8, 16, 16), f"{Q}.scale_weight": scales()},
    "mxfp4": {
        "model.layers.0.mlp.experts.down_proj_blocks": codes(U8, 2, 16, 1, 16),
        "model.layers.0.mlp.experts.down_proj_scales": codes(U8, 2, 16, 1),
    },
    "nvfp4": {
        f"{Q}.weight": codes(U8, 16, 8),
        f"{Q}.weight_scale": codes(F8, 16, 1),
        f"{Q}.weight_scale_2": scales(),
    },
    "compressed-tensors": {
        f"{Q}.weight_packed": codes(I32, 16, 2),
        f"{Q}.weight_scale": scales(16, 1),
        f"{Q}.weight_shape": torch.tensor([16, 16]),
    },
    "mlx": {
        f"{Q}.weight": codes(torch.uint32, 16, 2),
        f"{Q}.scales": scales(16, 1),
        f"{Q}.biases": scales(16, 1),
    },
    "quanto": {f"{Q}.weight._data": codes(I8, 16, 16), f"{Q}.weight._scale": scales(16, 1)},
    "hqq": {f"{Q}.W_q": codes(U8, 8, 16), f"{Q}.scale": scales(1, 16), f"{Q}.zero": scales(1, 16)},
    "quip": {f"{Q}.Qidxs": codes(torch.int16, 4, 4), f"{Q}.SU": scales(16), f"{Q}.SV": scales(16)},
    "aqlm": {f"{Q}.codes": codes(I8, 16, 2, 1), f"{Q}.codebooks": scales(1, 256, 1, 8)},
}


def quantised(what: str, seed: int = 0) -> State:
    state = family(0, seed=seed)[0]
    del state[f"{Q}.weight"]
    return state | QUANTISED[what]


def header(state: State, config: Any = None, files: tuple[str, ...] = ()) -> ModelHeader:
    infos = {
        name: TensorInfo(name, str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in state.items()
    }
    return ModelHeader("m", infos, config or {}, quantisation_files=files)


@pytest.mark.parametrize("what", QUANTISED)
def test_quantised_weights_are_refused(tmp_path: Path, what: str) -> None:
    """Whatever the config says, and with nothing said of names that differ."""
    assert (why_unmergeable(header(quantised(what))) or "").startswith("is quantized (model.layers")
    folders = [write_model(tmp_path / f"m{k}", quantised(what, k)) for k in range(2)]
    folders.insert(0, write_model(tmp_path / "base", family(0)[0]))
    for config in (recipe("linear", folders), recipe("ties", folders, density=0.5)):
        problems = plan_checkpoints(config).problems
        assert len(problems) == 2
        for folder, problem in zip(folders[1:], problems, strict=True):
            assert problem.startswith(f"model {folder} is quantized (model.layers.0.")
            assert "dequantize it first" in problem
    with pytest.raises(MismatchError, match=r"(?s)models\[0\] is quantized.*models\[1\] is quant"):
        pymerge.merge([quantised(what), quantised(what, 1)], method="linear", weight=0.5)
    with pytest.raises(MismatchError, match="base is quantized"):
        pymerge.merge([family(0)[0]], quantised(what), method="ties")
    with pytest.raises(MismatchError, match=r"(?s)base is quantized.*models\[0\] is quantized"):
        pymerge.ties([quantised(what, 1)], quantised(what))


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ({"quantization_config": {"quant_method": "new"}}, None),
        ({"quantization": {"bits": 4}}, None),
        ({"compression_config": {"format": "x"}}, None),
        ({"text_config": {"quantization_config": {"bits": 4}}}, None),
        ({}, "quantize_config.json"),
        ({}, "quant_config.json"),
        ({}, "hf_quant_config.json"),
    ],
)
def test_what_is_declared_is_enough_where_tensors_may_be_codes(
    tmp_path: Path, config: Any, file: str | None
) -> None:
    """Of a format that is not known."""
    states = family()
    for state in states:
        state[f"{Q}.tiles"] = codes(I32, 4, 4)
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    assert plan_checkpoints(recipe("linear", folders)).problems == ()
    if file is not None:
        (folders[1] / file).write_text("{}")
    (folders[1] / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (problem,) = plan_checkpoints(recipe("linear", folders)).problems
    said = file or next(declared(config))
    assert problem.startswith(f"model {folders[1]} is quantized (it") and f"has a {said}" in problem
    assert f"{Q}.tiles is int32" in problem


def test_integers_that_are_no_codes() -> None:
    declares = {"quantization_config": {"bits": 4}}
    plain: State = {
        "attn.relative_position_index": torch.ones(4, 4, dtype=torch.int64),
        "attn.logit_scale": torch.ones(4, 1),
        "attn.window_index": torch.ones(4, 4, dtype=I32),
        "attn.bias_idxs": torch.ones(4, 4, dtype=I32),
        "attn.causal_mask": torch.ones(4, 4, dtype=U8),
        "attn.scale": torch.ones(1),
        "embeddings.position_ids": torch.ones(1, 4, dtype=I32),
        "embeddings.scale": torch.ones(1),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=U8),
        "h.0.attn.scale": torch.ones(1),
        "norm.num_batches_tracked": torch.tensor(3),
        "spiece_model": torch.ones(99, dtype=U8),
        "logit_scale": torch.ones(()),
    }
    assert why_unmergeable(header(plain)) is None
    del plain["spiece_model"]
    assert not is_quantised(header(plain, declares))
    assert [*declared({"quantization": {"codebook": 8192}, "quantization_config": None})] == []
    assert not is_quantised(header(family(0)[0], declares, ("quantize_config.json",)))
    assert not is_quantised(header(family(0, torch.float32)[0], declares))


def test_a_copy_may_be_of_anything(tmp_path: Path) -> None:
    state = quantised("gptq")
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    folder = write_model(tmp_path / "m", state, config)
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    copied = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    merge_checkpoints(copied, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["quantization_config"] == config["quantization_config"]
    copied["models"][0]["parameters"] = {"scale": 0.5}  # type: ignore[index]
    assert "is quantized" in str(plan_checkpoints(copied).problems)


# Adapters.

L = "base_model.model.model.layers.0.self_attn.q_proj"
ADAPTERS: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "peft": [(f"{L}.lora_A.weight", (4, 8)), (f"{L}.lora_B.weight", (8, 4))],
    "peft in memory": [(f"{L}.lora_A.default.weight", (4, 8)), (f"{L}.lora_B.default.weight", (8, 4))],
    "peft with a trained head": [
        (f"{L}.lora_A.weight", (4, 8)),
        (f"{L}.lora_B.weight", (8, 4)),
        ("base_model.model.lm_head.weight", (9, 8)),
    ],
    "dora": [
        (f"{L}.lora_A.weight", (4, 8)),
        (f"{L}.lora_B.weight", (8, 4)),
        (f"{L}.lora_magnitude_vector", (8,)),
    ],
    "embedding": [("embed.lora_embedding_A", (4, 9)), ("embed.lora_embedding_B", (8, 4))],
    "kohya": [
        ("lora_unet_q.lora_down.weight", (4, 8)),
        ("lora_unet_q.lora_up.weight", (8, 4)),
        ("lora_unet_q.alpha", ()),
    ],
    "diffusers": [
        ("transformer.blocks.0.attn.to_q.lora_A.weight", (4, 8)),
        ("transformer.blocks.0.attn.to_q.lora_B.weight", (8, 4)),
    ],
    "diffusers of old": [
        ("unet.attn1.processor.to_q_lora.down.weight", (4, 8)),
        ("unet.attn1.processor.to_q_lora.up.weight", (8, 4)),
    ],
    "loha": [(f"lora_te_q.hada_w{k}_{f}", (4, 4)) for k in "12" for f in "ab"],
    "lokr": [("lycoris_q.lokr_w1", (2, 2)), ("lycoris_q.lokr_w2_a", (4, 2)), ("lycoris_q.lokr_w2_b", (2, 4))],
    "oft": [("lora_unet_q.oft_blocks", (2, 4, 4)), ("lora_unet_q.alpha", ())],
    "vera": [(f"{L}.vera_lambda_b", (8,)), (f"{L}.vera_lambda_d", (4,))],
}  # fmt: skip


def adapter(what: str) -> State:
    return {name: torch.ones(shape) for name, shape in ADAPTERS[what]}


@pytest.mark.parametrize("what", ADAPTERS)
def test_adapters_are_refused(tmp_path: Path, what: str) -> None:
    folders = [write_model(tmp_path / f"m{k}", adapter(what)) for k in range(2)]
    files = [folder / "model.safetensors" for folder in folders]
    for found in (folders, files):
        problems = plan_checkpoints(recipe("linear", [found[0], *found])).problems
        assert len(problems) == 2 and all("merge_and_unload" in each for each in problems)
        assert problems[1].startswith(f"model {found[1]} holds an adapter, not a model (")
        assert ADAPTERS[what][0][0] in problems[1]
    with pytest.raises(MismatchError, match=r"models\[1\] holds an adapter"):
        pymerge.merge([adapter(what)] * 2, method="linear", weight=0.5)
    with pytest.raises(MismatchError, match=r"models\[1\] holds an adapter"):
        pymerge.ties([adapter(what)] * 2)


@pytest.mark.parametrize("what", ["peft", "dora", "diffusers"])
def test_layers_that_are_not_merged_yet_are_refused(tmp_path: Path, what: str) -> None:
    states = [state | adapter(what) for state in family()]
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    problems = plan_checkpoints(recipe("ties", folders, density=0.5)).problems
    assert len(problems) == 3 and all("has LoRA layers beside its weights" in p for p in problems)


def test_names_that_only_sound_like_adapters() -> None:
    """RWKV 7 and latent attention have low-rank weights of their own; (IA)^3 are vectors."""
    names = ["attn.w_lora.lora.0.weight", "attn.w_lora.lora.2.weight", "attn.kv_a_proj.weight"]
    names += ["attn.k_proj.ia3_l", "mlp.explora.A", "flora_A.weight", "x.lora_Alpha", "h.lora_A"]
    state = {name: torch.ones(4, 4) for name in names}
    assert why_unmergeable(header(state)) is None


def test_numbers_alone_are_no_model(tmp_path: Path) -> None:
    """What a training loop logs beside the weights, given in their place."""
    logged = {"loss": torch.tensor(0.5), "step": torch.tensor(7)}
    said = r"holds no tensors of a model, only single numbers \((loss, step|step, loss)\)"
    folders = [write_model(tmp_path / f"m{k}", logged) for k in range(2)]
    problems = plan_checkpoints(recipe("linear", [folders[0], *folders])).problems
    assert len(problems) == 2 and all(re.search(said, each) for each in problems)
    with pytest.raises(MismatchError, match=said):
        pymerge.merge([logged, logged], method="linear", weight=0.5)
    scaled = {"logit_scale": torch.tensor(1.0), "proj.weight": torch.ones(2, 2)}
    assert pymerge.merge([scaled], method="linear")["logit_scale"] == 1
