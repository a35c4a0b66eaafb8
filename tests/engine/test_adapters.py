"""Models with an adapter in merges of folders: how they are named, found, read and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import UP, Q, adapter, factors, with_update, write_adapter
from folder_cases import State, family, read_result, recipe, write_family, write_model
from safetensors.torch import save_file

import pymerge
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import MergeError, OutputError


def passthrough(reference: Any) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": reference}]}


def merged(config: Any, out: Path, **options: Any) -> State:
    merge_checkpoints(config, out, **options)
    return read_result(out)


def assert_close(actual: State, wanted: State, dtype: torch.dtype = torch.float32) -> None:
    assert sorted(actual) == sorted(wanted)
    for name, tensor in wanted.items():
        assert actual[name].dtype == dtype, name
        torch.testing.assert_close(
            actual[name].float(), tensor.to(dtype).float(), rtol=1e-5, atol=1e-6, msg=name
        )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", family(0, torch.float32)[0])


BASE = family(0, torch.float32)[0]


@pytest.mark.parametrize("form", ["text", "mapping", "relative", "bin", "file"])
def test_how_an_adapter_is_named(
    tmp_path: Path, base: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = adapter()
    folder = write_adapter(tmp_path / "lora", state)
    named: Any = f"{base}+{folder}"
    if form == "mapping":
        named = {"model": {"path": str(base)}, "lora": {"path": str(folder)}}
    elif form == "relative":
        monkeypatch.chdir(tmp_path)
        named = "base+lora"
    elif form == "bin":
        (folder / "adapter_model.safetensors").unlink()
        torch.save(state, folder / "adapter_model.bin")
    elif form == "file":
        named += "/adapter_model.safetensors"
    assert_close(merged(passthrough(named), tmp_path / "out"), with_update(BASE, state))


def test_relative_to_the_recipe(tmp_path: Path, base: Path) -> None:
    state = adapter()
    write_adapter(tmp_path / "lora", state)
    text = "merge_method: passthrough\nmodels: [{model: base+lora}]\n"
    (tmp_path / "recipe.yml").write_text(text)
    result = merged(tmp_path / "recipe.yml", tmp_path / "out")
    assert_close(result, with_update(BASE, state))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- base+lora\n" in card and str(tmp_path) not in card


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "base_model.model.module."])
@pytest.mark.parametrize("bare", [False, True])
def test_names_are_matched_by_one_prefix(tmp_path: Path, prefix: str, bare: bool) -> None:
    """As those of models are: `model.` is lost where the base was saved by another class."""
    states = BASE
    if bare:
        states = {name.removeprefix("model."): tensor for name, tensor in BASE.items()}
    base = write_model(tmp_path / "base", states)
    folder = write_adapter(tmp_path / "lora", adapter(prefix=prefix))
    wanted = with_update(BASE, adapter())
    if bare:
        wanted = {name.removeprefix("model."): tensor for name, tensor in wanted.items()}
    assert_close(merged(passthrough(f"{base}+{folder}"), tmp_path / "out"), wanted)


def test_the_base_of_an_adapter(tmp_path: Path, base: Path) -> None:
    """The recipe's base_model, else what its config names; a note where these differ."""
    states = [adapter(1), adapter(2, rank=3)]
    own = [write_adapter(tmp_path / f"a{k}", s, r=[4, 3][k], lora_alpha=[8, 6][k],
                         base_model_name_or_path=str(base)) for k, s in enumerate(states)]  # fmt: skip
    updated = [with_update(BASE, state) for state in states]
    linear = {
        "merge_method": "linear",
        "models": [{"model": str(path), "parameters": {"weight": 1.0}} for path in own],
    }
    mean = {name: (updated[0][name] + updated[1][name]) / 2 for name in BASE}
    assert plan_checkpoints(linear).notes == ()
    assert_close(merged(linear, tmp_path / "mean"), mean)
    other_state = {name: tensor + 1 for name, tensor in BASE.items()}
    other = write_model(tmp_path / "other", other_state)
    config = recipe("task_arithmetic", [other, *own])
    notes = " ".join(plan_checkpoints(config).notes)
    assert f"{own[0]} is an adapter of {base} by its config, and is applied to {other}" in notes
    total = with_update(with_update(other_state, states[0], 1.0), states[1], 1.0)
    assert_close(merged(config, tmp_path / "sum"), total)
    assert "is an adapter of" not in " ".join(plan_checkpoints(recipe("ties", [base, *own])).notes)


def test_an_adapter_without_a_base(tmp_path: Path, base: Path) -> None:
    folder = write_adapter(tmp_path / "lora", adapter())
    with pytest.raises(MergeError, match=r"its config names no base; write\s+base\+"):
        plan_checkpoints(passthrough(str(folder)))
    gone = write_adapter(tmp_path / "gone", adapter(), base_model_name_or_path="./not/here")
    with pytest.raises(MergeError, match=r"does not exist.*the base of the adapter .*gone"):
        plan_checkpoints(passthrough(str(gone)))
    beside = write_adapter(tmp_path / "beside", adapter(), base_model_name_or_path="../base")
    assert plan_checkpoints(passthrough(str(beside))).problems == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """Two updates of 0.4 units in the last place each: together they round up, and each alone to
    nothing. The result has the base's dtype, in linear merges and copies too.
    """
    ulp = torch.finfo(dtype).eps
    states = {name: torch.ones_like(tensor).to(dtype) for name, tensor in BASE.items()}
    base = write_model(tmp_path / "base", states)
    module = {Q.format(0): (16, 16)}
    up = {
        name: torch.full_like(tensor, 1.0 if ".lora_A." in name else 0.4 * ulp)
        for name, tensor in factors(module, 1).items()
    }
    lora = write_adapter(tmp_path / "lora", up, r=1, lora_alpha=1)
    weight = f"{Q.format(0)}.weight"
    two = recipe("task_arithmetic", [base, lora, Path(f"{base}+{lora}")])
    for model in two["models"]:
        model["parameters"]["weight"] = 1.0
    result = merged(two, tmp_path / "two")
    assert result[weight].dtype == dtype and bool((result[weight] == 1 + ulp).all())
    alone = merged(passthrough(f"{base}+{lora}"), tmp_path / "one")
    assert alone[weight].dtype == dtype and bool((alone[weight] == 1).all())
    linear = recipe("linear", [base, base, Path(f"{base}+{lora}")])
    result = merged(linear, tmp_path / "linear")
    assert {tensor.dtype for tensor in result.values()} == {dtype}
    config = json.loads((tmp_path / "linear" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "method", ["ties", "dare_ties", "breadcrumbs", "task_arithmetic", "linear"]
)
def test_every_method_takes_adapters_as_models(tmp_path: Path, base: Path, method: str) -> None:
    """The result is that of the merged models, which differ by rounding."""
    states = [adapter(1), adapter(2)]
    loras = [write_adapter(tmp_path / f"a{k}", state) for k, state in enumerate(states)]
    full = [
        write_model(tmp_path / f"m{k}", with_update(BASE, state)) for k, state in enumerate(states)
    ]
    options = {} if method in ("task_arithmetic", "linear") else {"density": 0.6}
    named = [
        Path(f"{base}+{loras[0]}"),
        loras[1] if method != "linear" else Path(f"{base}+{loras[1]}"),
    ]
    wanted = merged(recipe(method, [base, *full], **options), tmp_path / "wanted")
    result = merged(recipe(method, [base, *named], **options), tmp_path / "out")
    for name, tensor in wanted.items():
        same = torch.isclose(result[name], tensor, rtol=1e-5, atol=1e-6)
        assert int((~same).sum()) <= 1, name  # an entry at the threshold


def test_slices_and_gradients_of_adapted_models(tmp_path: Path, base: Path) -> None:
    state = adapter()
    folder = write_adapter(tmp_path / "lora", state)
    sources = [[{"model": str(base), "layer_range": [0, 1]}],
               [{"model": f"{base}+{folder}", "layer_range": [0, 2]}]]  # fmt: skip
    config = {"merge_method": "passthrough", "slices": [{"sources": each} for each in sources]}
    result = merged(config, tmp_path / "out")
    updated = with_update(BASE, state)
    for layer, (whose, its) in enumerate([(BASE, 0), (updated, 0), (updated, 1)]):
        assert torch.allclose(
            result[f"{Q.format(layer)}.weight"], whose[f"{Q.format(its)}.weight"], atol=1e-6
        )


def test_blocks_and_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    """Of weights that are read in several units and pieces."""
    generator = torch.Generator().manual_seed(0)
    state = {"a.weight": torch.randn(3000, 5000, generator=generator).bfloat16()}
    base = write_model(tmp_path / "base", state, {})
    lora = write_adapter(tmp_path / "lora", factors({"a": (3000, 5000)}))
    files = []
    for threads in (1, 3):
        config = recipe("task_arithmetic", [base, lora])
        merge_checkpoints(config, tmp_path / f"t{threads}", threads=threads)
        files.append((tmp_path / f"t{threads}" / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    wanted = with_update(state, factors({"a": (3000, 5000)}), 1.0)["a.weight"].bfloat16()
    result = read_result(tmp_path / "t1")["a.weight"]
    assert (result != wanted).float().mean() < 1e-4


def test_resume_knows_the_adapter(tmp_path: Path, base: Path) -> None:
    """Its files and its config are among the inputs, and so is a change of one of them."""
    folder = write_adapter(tmp_path / "lora", adapter())
    config = recipe("task_arithmetic", [base, folder])
    out = tmp_path / "out"

    def stop(done: int, whole: int, name: str) -> None:
        if done > whole * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, out, out_shard_size=2000, progress=stop)
    manifest = json.loads(next(tmp_path.glob(".out*/pymerge*.json")).read_text())
    names = {file["name"] for each in manifest["inputs"] for file in each["files"]}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace("8", "9"))
    with pytest.raises(OutputError, match=r"files of lora changed since"):
        merge_checkpoints(config, out, out_shard_size=2000, resume=True)
    (folder / "adapter_config.json").write_text(text)


def test_the_output_must_not_be_the_adapter(tmp_path: Path, base: Path) -> None:
    folder = write_adapter(tmp_path / "lora", adapter())
    with pytest.raises(OutputError):
        merge_checkpoints(passthrough(f"{base}+{folder}"), folder, overwrite=True)


def test_an_adapters_tokenizer_is_the_results(tmp_path: Path, base: Path) -> None:
    """Where it has one of its own: it may have been trained with added tokens."""

    def tokenizer(folder: Path, *extra: str) -> None:
        words = {f"t{k}": k for k in range(36)}
        added = [{"id": 36 + k, "content": text} for k, text in enumerate(extra)]
        content = {"model": {"type": "BPE", "vocab": words}, "added_tokens": added}
        (folder / "tokenizer.json").write_text(json.dumps(content))

    tokenizer(base)
    state = adapter()
    state["base_model.model.model.embed_tokens.weight"] = torch.ones(38, 16)
    state["base_model.model.lm_head.weight"] = torch.ones(38, 16)
    folder = write_adapter(tmp_path / "lora", state)
    tokenizer(folder, "<a>", "<b>")
    (folder / "chat_template.jinja").write_text("{{ messages }} of the adapter")
    result = merged(passthrough(f"{base}+{folder}"), tmp_path / "out")
    assert result["model.embed_tokens.weight"].shape == (38, 16)
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    assert (out / "chat_template.jinja").exists()
    assert not (out / "adapter_config.json").exists()
    # The base's rows do not stand for the same tokens as those of another adapter.
    config = recipe("linear", [base, base, Path(f"{base}+{folder}")])
    assert "vocabulary sizes differ" in " ".join(plan_checkpoints(config).problems)
    config["tokenizer_source"] = f"{base}+{folder}"
    assert merged(config, tmp_path / "both")["lm_head.weight"].shape == (38, 16)


def broken(what: str) -> tuple[State, dict[str, Any]]:
    state, settings = adapter(), {}
    first = f"base_model.model.{Q.format(0)}.lora_A.weight"
    if what == "another rank":
        settings = {"r": 8}
    elif what == "another width":
        state = factors({Q.format(0): (16, 16), UP.format(0): (24, 32)}, prefix="base_model.model.")
    elif what == "other modules":
        state = factors({"decoder.fc": (16, 16)})
    elif what == "half of a pair":
        del state[first]
    elif what == "factors that do not fit each other":
        state[first] = torch.ones(3, 16)
    elif what == "several":
        state = {name.replace("_A.", "_A.one."): t for name, t in state.items()} | {
            name.replace("_A.", "_A.two."): t.clone() for name, t in state.items()
        }
    elif what == "dora without magnitudes":
        settings = {"use_dora": True}
    elif what == "magnitudes without dora":
        state[first.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(16)
    elif what == "integers":
        state[first] = torch.ones(4, 16, dtype=torch.int8)
    elif what == "another kind":
        state |= {f"base_model.model.{Q.format(0)}.vera_lambda_b": torch.ones(16)}
    elif what == "a bias that the base lacks":
        state[first.replace("lora_A.weight", "lora_B.bias")] = torch.ones(16)
    elif what == "a damaged rank":
        settings = {"r": "4"}
    elif what == "a damaged alpha":
        settings = {"lora_alpha": float("nan")}
    elif what == "a damaged pattern":
        settings = {"rank_pattern": {"(": 4}}
    elif what == "patterns that are a list":
        settings = {"alpha_pattern": ["q_proj"]}
    elif what == "experts":
        settings = {"target_parameters": ["mlp.experts.gate_up_proj"]}
    elif what == "prefixes":
        settings = {"peft_type": "PREFIX_TUNING"}
    return state, settings


BROKEN = {
    "another rank": "factors of rank 4, and by its adapter_config.json it has rank 8",
    "another width": r"up_proj.weight is \[24, 16\] and the update \[24, 32\]; name the model that",
    "other modules": "updates modules that .* does not have, nor with any one prefix: decoder.fc",
    "half of a pair": r"has no lora_A \(or lora_down\); download it again",
    "factors that do not fit each other": r"are \[3, 16\] and \[16, 4\], which have no product",
    "several": "holds several adapters",
    "dora without magnitudes": "has no lora_magnitude_vector, and its .* sets use_dora",
    "magnitudes without dora": "has a lora_magnitude_vector, and its .* does not set use_dora",
    "integers": "cannot be merged here",
    "another kind": "vera_lambda_b' is none of LoRA's two factors",
    "a bias that the base lacks": r"bias is None and its update \(16,\)",
    "a damaged rank": "r is '4', not a number of factors",
    "a damaged alpha": "lora_alpha is 'nan', not a finite number",
    "a damaged pattern": r"rank_pattern '\(' is no pattern",
    "patterns that are a list": "alpha_pattern is not a mapping",
    "experts": "it sets target_parameters: it updates parameters that are no module's weight",
    "prefixes": "peft_type is 'PREFIX_TUNING', and only 'LORA'",
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_applied_is_refused(tmp_path: Path, base: Path, what: str) -> None:
    state, settings = broken(what)
    folder = write_adapter(tmp_path / "lora", state, **settings)
    with pytest.raises(MergeError, match=f"(?s){BROKEN[what]}"):
        plan_checkpoints(recipe("ties", [base, folder], density=0.5))


def test_folders_that_are_no_adapter(tmp_path: Path, base: Path) -> None:
    folder = write_adapter(tmp_path / "lora", adapter())
    (folder / "adapter_config.json").rename(tmp_path / "kept.json")
    with pytest.raises(MergeError, match=r"holds no adapter: there is no adapter_config.json"):
        plan_checkpoints(passthrough(f"{base}+{folder}"))
    with pytest.raises(MergeError, match=r"without its adapter_config.json, and no alpha for"):
        plan_checkpoints(passthrough(f"{base}+{folder}/adapter_model.safetensors"))
    (tmp_path / "kept.json").rename(folder / "adapter_config.json")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        MergeError, match=r"neither adapter_model.safetensors nor adapter_model.bin"
    ):
        plan_checkpoints(passthrough(f"{base}+{folder}"))


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    state = BASE | {f"{Q.format(0)}.weight": torch.ones(128, 1, dtype=torch.uint8)}
    state[f"{Q.format(0)}.weight.absmax"] = torch.ones(4)
    base = write_model(tmp_path / "base", state)
    folder = write_adapter(tmp_path / "lora", adapter())
    with pytest.raises(MergeError, match=r"the base of the adapter .*, is quantized"):
        plan_checkpoints(passthrough(f"{base}+{folder}"))


def test_a_state_dict_of_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds an adapter.*base\+adapter"):
        pymerge.merge([adapter()], BASE, method="ties")


def test_hub_ids(tmp_path: Path) -> None:
    """In a process of its own, from the cache: huggingface_hub reads its environment once."""
    commit = "0123456789abcdef0123456789abcdef01234567"

    def cached(name: str) -> Path:
        repo = tmp_path / f"models--some--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        return repo / "snapshots" / commit

    write_model(cached("base"), BASE)
    settings = {"base_model_name_or_path": "some/base", "revision": None}
    write_adapter(cached("lora"), adapter(), **settings)
    code = (
        "from pymerge.engine.merge import merge_checkpoints\n"
        "for k, name in enumerate(['some/base+some/lora', 'some/base@main+some/lora@main', 'some/lora']):\n"
        "    recipe = {'merge_method': 'passthrough', 'models': [{'model': name}]}\n"
        f"    merge_checkpoints(recipe, {str(tmp_path)!r} + f'/out{{k}}')\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    wanted = with_update(BASE, adapter())
    for k in range(3):
        assert_close(read_result(tmp_path / f"out{k}"), wanted)
    card = (tmp_path / "out0" / "README.md").read_text()
    assert '- "some/base"\n- "some/lora"\n' in card and "- some/base+some/lora\n" in card


# kohya's files.


def kohya(modules: dict[str, tuple[int, ...]], alpha: float | None, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for module, (outputs, *inputs) in modules.items():
        ones = [1] * (len(inputs) - 1)
        state[f"{module}.lora_down.weight"] = torch.randn(4, *inputs, generator=generator)
        state[f"{module}.lora_up.weight"] = torch.randn(outputs, 4, *ones, generator=generator)
        if alpha is not None:
            state[f"{module}.alpha"] = torch.tensor(alpha)
    return state


UNET = {
    "down_blocks.0.attn1.to_q.weight": (8, 6),
    "down_blocks.0.attn1.to_out.0.weight": (6, 8),
    "down_blocks.0.resnets.0.conv1.weight": (4, 3, 3, 3),
    "proj_in.weight": (6, 6, 1, 1),
    "proj_in.bias": (6,),
}
LORA = {
    "lora_unet_down_blocks_0_attn1_to_q": (8, 6),
    "lora_unet_down_blocks_0_attn1_to_out_0": (6, 8),
    "lora_unet_down_blocks_0_resnets_0_conv1": (4, 3, 3, 3),
    "lora_unet_proj_in": (6, 6),
}
TEXT = {"lora_te1_text_model_encoder_layers_0_mlp_fc1": (5, 5)}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("alpha", [2.0, 2, 0, None])
def test_kohyas_files(tmp_path: Path, prefix: str, alpha: float | None) -> None:
    """By names with underscores for dots; what is for the text encoder is left out of a unet."""
    generator = torch.Generator().manual_seed(5)
    unet = {prefix + n: torch.randn(s, generator=generator) for n, s in UNET.items()}
    base = write_model(tmp_path / "unet", unet, {})
    state = kohya(LORA, alpha) | kohya(TEXT, alpha)
    save_file(state, tmp_path / "style.safetensors")
    wanted = dict(unet)
    for module, name in zip(LORA, UNET, strict=False):
        up, down = (state[f"{module}.lora_{which}.weight"].double() for which in ("up", "down"))
        product = (up.flatten(1) @ down.flatten(1)).reshape(UNET[name])
        wanted[prefix + name] = (unet[prefix + name] + (alpha or 4) / 4 * product).float()
    for config in (
        passthrough(f"{base}+{tmp_path / 'style.safetensors'}"),
        recipe("task_arithmetic", [base, tmp_path / "style.safetensors"]),
    ):
        if config["merge_method"] == "task_arithmetic":
            config["models"][0]["parameters"]["weight"] = 1.0
        notes = " ".join(plan_checkpoints(config).notes)
        assert "its 1 update lora_te1_... are for another model" in notes
        assert_close(merged(config, tmp_path / "out", overwrite=True), wanted)


@pytest.mark.parametrize(
    "alpha",
    [torch.ones(2), torch.ones(0), torch.tensor(torch.inf), torch.ones(2, dtype=torch.int64)],
)
def test_alphas_that_are_no_number(tmp_path: Path, alpha: torch.Tensor) -> None:
    base = write_model(tmp_path / "unet", {"q.weight": torch.zeros(8, 8)}, {})
    state = kohya({"lora_unet_q": (8, 8)}, None) | {"lora_unet_q.alpha": alpha}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(MergeError, match="the alpha of lora_unet_q is not a finite number"):
        plan_checkpoints(passthrough(f"{base}+{tmp_path / 'x.safetensors'}"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64, torch.bfloat16])
def test_an_alpha_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """An integer where it was never given, so that it is the rank."""
    base = write_model(tmp_path / "unet", {"q.weight": torch.zeros(8, 8)}, {})
    state = kohya({"lora_unet_q": (8, 8)}, None)
    state["lora_unet_q.alpha"] = torch.tensor([2], dtype=dtype)
    save_file(state, tmp_path / "x.safetensors")
    result = merged(passthrough(f"{base}+{tmp_path / 'x.safetensors'}"), tmp_path / "out")
    up, down = state["lora_unet_q.lora_up.weight"], state["lora_unet_q.lora_down.weight"]
    torch.testing.assert_close(result["q.weight"], 2 / 4 * up @ down)


def test_two_files_of_kohya_merge_without_cross_terms(tmp_path: Path) -> None:
    base = write_model(tmp_path / "unet", {"q.weight": torch.zeros(8, 8)}, {})
    total = torch.zeros(8, 8)
    files = []
    for seed, alpha in ((1, 4.0), (2, 8.0)):
        state = kohya({"lora_unet_q": (8, 8)}, alpha, seed)
        save_file(state, tmp_path / f"{seed}.safetensors")
        files.append(tmp_path / f"{seed}.safetensors")
        up, down = state["lora_unet_q.lora_up.weight"], state["lora_unet_q.lora_down.weight"]
        total += 0.5 * alpha / 4 * up @ down
    result = merged(recipe("task_arithmetic", [base, *files]), tmp_path / "out")
    torch.testing.assert_close(result["q.weight"], total)
    with pytest.raises(MergeError, match=r"holds an adapter, not a model .* base\+adapter"):
        merge_checkpoints(recipe("linear", [base, *files]), tmp_path / "no")


def test_kohyas_names_of_another_library(tmp_path: Path) -> None:
    unet = {name: torch.zeros(shape) for name, shape in UNET.items()}
    base = write_model(tmp_path / "unet", unet, {})
    state = kohya(LORA | {"lora_unet_input_blocks_1_0": (6, 6)}, 4.0)
    save_file(state, tmp_path / "style.safetensors")
    with pytest.raises(MergeError, match=r"with underscores for dots: lora_unet_down_blocks_0_at"):
        plan_checkpoints(passthrough(f"{base}+{tmp_path / 'style.safetensors'}"))
    save_file(state | {"lora_unet_q.dora_scale": torch.ones(6)}, tmp_path / "dora.safetensors")
    with pytest.raises(MergeError, match=r"cannot be merged here \('lora_unet_q.dora_scale'"):
        plan_checkpoints(passthrough(f"{base}+{tmp_path / 'dora.safetensors'}"))


def test_plans_of_plain_models_import_nothing_for_adapters(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    code = (
        "import sys; from pymerge.engine.merge import plan_checkpoints\n"
        f"plan_checkpoints({recipe('ties', folders, density=0.5)!r})\n"
        "assert 'pymerge.checkpoint.low_rank' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
