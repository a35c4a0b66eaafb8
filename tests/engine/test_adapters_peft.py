"""Adapters of peft on their bases: the numbers are those of peft's merge_and_unload in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import State, read_result
from safetensors.torch import save_file

from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import MergeError

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3)
        self.point = torch.nn.Conv2d(6, 8, 1)
        self.line = torch.nn.Conv1d(4, 6, 5)
        self.volume = torch.nn.Conv3d(2, 4, 2)
        self.head = torch.nn.Linear(8, 5)
        self.own = torch.nn.Linear(5, 5)


def llama(**more: Any) -> Any:
    settings = {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | more))


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


def save_base(model: Any, folder: Path) -> Path:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    return folder


def trained(model: Any, folder: Path, seed: int = 1, **settings: Any) -> tuple[State, Path]:
    """(what peft merges, the saved adapter) of an adapter with random factors."""
    torch.manual_seed(seed)
    made = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | settings))
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            start = 1.0 if "magnitude" in name else 0.0
            parameter.data.normal_(start, 0.2).add_(start * 0.1)
    made.save_pretrained(folder)
    merged = made.merge_and_unload()
    return {name: t.detach().clone() for name, t in merged.state_dict().items()}, folder


Q, UP = "q_proj", "up_proj"
LLAMA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": [Q, UP, "down_proj"]},
    "patterns": {
        "target_modules": [Q, UP, "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, r"layers\.0\..*up_proj": 2, "v_proj": 1},
        "alpha_pattern": {"q_proj": 12, "model.layers.1.mlp.up_proj": 5, "_proj": 99},
    },
    "rslora": {"target_modules": [Q, UP], "use_rslora": True, "rank_pattern": {Q: 2}},
    "all": {"target_modules": "all-linear"},
    "saved modules": {"target_modules": [Q], "modules_to_save": ["lm_head", "norm"]},
    "embeddings": {"target_modules": [Q, "embed_tokens", "lm_head"]},
    "bias of the factors": {"target_modules": [Q, "v_proj"], "lora_bias": True},
    "all biases": {"target_modules": [Q], "bias": "all"},
    "dora": {"target_modules": [Q, UP, "k_proj"], "use_dora": True},
    "dora of embeddings": {"target_modules": ["embed_tokens", UP], "use_dora": True},
    "one layer": {"target_modules": [Q], "layers_to_transform": [1]},
}


def passthrough(reference: str, **more: Any) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": reference}], **more}


def assert_close(actual: State, wanted: State) -> None:
    assert sorted(actual) == sorted(wanted)
    for name, tensor in wanted.items():
        assert actual[name].dtype == tensor.dtype, name
        torch.testing.assert_close(actual[name], tensor, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("case", LLAMA)
def test_llama(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    base = save_base(llama(), tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    wanted, folder = trained(model, tmp_path / "adapter", **LLAMA[case])
    changed = [name for name in wanted if not torch.equal(wanted[name], before[name])]
    assert changed
    merge_checkpoints(passthrough(f"{base}+{folder}"), tmp_path / "out")
    result = read_result(tmp_path / "out")
    assert_close(result, wanted)
    for name in wanted.keys() - set(changed):
        assert torch.equal(result[name], before[name])
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(dict(loaded.state_dict()), wanted)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "modules",
    [["c_attn", "c_proj", "c_fc"], ["c_proj"], ["c_attn", "c_proj", "lm_head", "wte"]],
)
def test_gpt2_stores_weights_the_other_way(tmp_path: Path, modules: list[str], dora: bool) -> None:
    """c_proj in attention is square; peft's flag is that of the last module it saw."""
    torch.manual_seed(0)
    base = save_base(gpt2(), tmp_path / "base")
    wanted, folder = trained(
        transformers.GPT2LMHeadModel.from_pretrained(base),
        tmp_path / "adapter",
        target_modules=modules,
        use_dora=dora,
    )
    merge_checkpoints(passthrough(f"{base}+{folder}"), tmp_path / "out")
    result = read_result(tmp_path / "out")
    assert_close(result, {name: wanted[name] for name in result})


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions(tmp_path: Path, dora: bool) -> None:
    torch.manual_seed(0)
    model = Convolutions()
    base = save_base(model, tmp_path / "base")
    modules = ["conv", "point", "head"] if dora else ["conv", "point", "line", "volume", "head"]
    wanted, folder = trained(model, tmp_path / "adapter", target_modules=modules, use_dora=dora)
    merge_checkpoints(passthrough(f"{base}+{folder}"), tmp_path / "out")
    assert_close(read_result(tmp_path / "out"), wanted)


def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=2))
    base = save_base(model, tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"])).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(MergeError, match="grouped convolution"):
        plan_checkpoints(passthrough(f"{base}+{tmp_path / 'adapter'}"))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_what_changes_the_base_is_refused(tmp_path: Path, start: str) -> None:
    base = save_base(llama(), tmp_path / "base")
    _, folder = trained(
        transformers.LlamaForCausalLM.from_pretrained(base),
        tmp_path / "adapter",
        target_modules=[Q],
        init_lora_weights=start,
    )
    with pytest.raises(MergeError, match=r"init_lora_weights is .* changed the base"):
        plan_checkpoints(passthrough(f"{base}+{folder}"))


OTHERS = {
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=[Q]),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=[Q]),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=[Q]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=[Q], total_step=10),
    "IA3": lambda: peft.IA3Config(target_modules=[Q], feedforward_modules=[]),
    "trainable tokens": lambda: peft.LoraConfig(target_modules=[Q], trainable_token_indices=[1]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_refused(tmp_path: Path, kind: str) -> None:
    base = save_base(llama(), tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, OTHERS[kind]()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"cannot be merged here: (peft_type is|it sets train)"):
        plan_checkpoints(passthrough(f"{base}+{tmp_path / 'adapter'}"))


def test_a_tied_embedding_changes_the_head_too(tmp_path: Path) -> None:
    base = save_base(llama(tie_word_embeddings=True), tmp_path / "base")
    load = transformers.LlamaForCausalLM.from_pretrained
    wanted, folder = trained(load(base), tmp_path / "a", target_modules=["embed_tokens"])
    config = passthrough(f"{base}+{folder}")
    assert any("changes both" in note for note in plan_checkpoints(config).notes)
    merge_checkpoints(config, tmp_path / "out")
    assert_close(dict(load(tmp_path / "out").state_dict()), wanted)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    "modules", [["lm_head", Q], ["lm_head"], ["lm_head", "embed_tokens"]], ids=str
)
def test_an_update_of_a_tied_output_layer_takes_the_pair_apart(
    tmp_path: Path, modules: list[str], dora: bool
) -> None:
    """The model computes what the adapted one does; peft's own merge adds the update to the
    embedding too.
    """
    base = save_base(llama(tie_word_embeddings=True), tmp_path / "base")
    load = transformers.LlamaForCausalLM.from_pretrained
    _, folder = trained(load(base), tmp_path / "a", target_modules=modules, use_dora=dora)
    config = passthrough(f"{base}+{folder}")
    assert any("updates the output layer" in note for note in plan_checkpoints(config).notes)
    merge_checkpoints(config, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    merged = load(tmp_path / "out")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = peft.PeftModel.from_pretrained(load(base), folder)(ids).logits
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    if "embed_tokens" not in modules:
        assert torch.equal(merged.model.embed_tokens.weight, load(base).model.embed_tokens.weight)
    with pytest.raises(MergeError, match="an update of an output layer that the base ties"):
        merge_checkpoints(config, tmp_path / "lora", rank="exact")


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "ensure_weight_tying"])
@pytest.mark.parametrize(
    "saved", [["lm_head"], ["embed_tokens", "lm_head"], ["embed_tokens"]], ids=str
)
def test_copies_of_tied_layers(tmp_path: Path, saved: list[str], tied: bool) -> None:
    """modules_to_save trains copies: of a tied pair each by itself, unless peft ties them too."""
    base = save_base(llama(tie_word_embeddings=True), tmp_path / "base")
    load = transformers.LlamaForCausalLM.from_pretrained
    options = {"modules_to_save": saved, "target_modules": [Q], "ensure_weight_tying": tied}
    wanted, folder = trained(load(base), tmp_path / "a", task_type="CAUSAL_LM", **options)
    config = passthrough(f"{base}+{folder}")
    if saved == ["embed_tokens"] and not tied:
        with pytest.raises(MergeError, match=r"another model.embed_tokens.weight, and was trained"):
            plan_checkpoints(config)
        return
    merge_checkpoints(config, tmp_path / "out")
    assert_close(dict(load(tmp_path / "out").state_dict()), wanted)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is tied
    if not tied:  # a merge with the base would lose the new output layer
        entry = {"model": f"{base}+{folder}", "parameters": {"weight": 1}}
        more = {"base_model": str(base), "models": [entry]}
        plan = plan_checkpoints({"merge_method": "task_arithmetic", **more})
        assert any("has trained an output layer of its own" in each for each in plan.problems)


def test_biases_of_what_a_copy_replaces_are_left_out(tmp_path: Path) -> None:
    """With bias="all", peft saves those of the base's own classifier beside its copy's."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    base = save_base(transformers.BertForSequenceClassification(config), tmp_path / "base")
    load = transformers.BertForSequenceClassification.from_pretrained
    options = {"target_modules": ["query", "dense"], "bias": "all", "task_type": "SEQ_CLS"}
    wanted, folder = trained(load(base), tmp_path / "a", **options)
    merge_checkpoints(passthrough(f"{base}+{folder}"), tmp_path / "out")
    assert read_result(tmp_path / "out").keys() == wanted.keys()
    assert_close(dict(load(tmp_path / "out").state_dict()), wanted)


def test_a_resized_embedding_brings_its_tokenizer_size(tmp_path: Path) -> None:
    """An adapter that was trained after tokens were added, with embeddings of its own."""
    torch.manual_seed(0)
    base = save_base(llama(), tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(40)
    wanted, folder = trained(
        model, tmp_path / "a", target_modules=[Q], modules_to_save=["embed_tokens", "lm_head"]
    )
    merge_checkpoints(passthrough(f"{base}+{folder}"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 40
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(dict(loaded.state_dict()), wanted)


def test_a_merge_of_adapters_is_that_of_the_merged_models(tmp_path: Path) -> None:
    """By two methods, of adapters of different ranks, named by themselves and with their base."""
    torch.manual_seed(0)
    base = save_base(llama(), tmp_path / "base")
    folders, merged = [], []
    for seed, rank in ((1, 2), (2, 5)):
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        wanted, folder = trained(model, tmp_path / f"a{seed}", seed, r=rank, target_modules=[Q, UP])
        folders.append(folder)
        merged.append(save_state(wanted, base, tmp_path / f"full{seed}"))
    for method in ("ties", "linear"):
        for named in ([str(folders[0]), f"{base}+{folders[1]}"], [str(f) for f in folders]):
            results = []
            for where, models in (("adapters", named), ("full", [str(f) for f in merged])):
                config: dict[str, Any] = {
                    "merge_method": method,
                    "models": [{"model": m, "parameters": {"weight": 0.6}} for m in models],
                }
                if method == "ties":
                    config |= {"base_model": str(base), "parameters": {"density": 0.7}}
                out = tmp_path / f"{method}-{where}"
                merge_checkpoints(config, out, overwrite=True)
                results.append(read_result(out))
            close = differing = 0
            for name, tensor in results[1].items():
                same = torch.isclose(results[0][name], tensor, rtol=1e-5, atol=1e-6)
                close, differing = close + int(same.sum()), differing + int((~same).sum())
            assert differing <= (4 if method == "ties" else 0), (method, differing, close)


def save_state(state: State, base: Path, folder: Path) -> Path:
    folder.mkdir()
    kept = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


# Adapters merged into an adapter, loaded by peft.


def loaded(base: Path, folder: Path, kind: Any) -> State:
    """What peft makes of an adapter on its base."""
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(base), folder)
    return dict(model.merge_and_unload().state_dict())


MERGED: dict[str, tuple[Any, Any, list[dict[str, Any]]]] = {
    "llama": (
        llama,
        transformers.LlamaForCausalLM,
        [
            {"target_modules": [Q, UP, "lm_head"], "rank_pattern": {UP: 2}},
            {"target_modules": [Q, "down_proj"], "r": 3, "use_rslora": True},
        ],
    ),
    "embeddings": (
        llama,
        transformers.LlamaForCausalLM,
        [{"target_modules": ["embed_tokens", Q]}, {"target_modules": ["embed_tokens"], "r": 2}],
    ),
    "saved modules": (
        llama,
        transformers.LlamaForCausalLM,
        [{"target_modules": [Q], "modules_to_save": ["lm_head"]}, {"target_modules": [Q]}],
    ),
    "gpt2": (
        gpt2,
        transformers.GPT2LMHeadModel,
        [{"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_proj", "c_fc"], "r": 2}],
    ),
}


@pytest.mark.parametrize("rank", ["exact", 16, 3])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("case", MERGED)
def test_peft_loads_what_is_merged(
    tmp_path: Path, case: str, method: str, rank: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged into the base by peft it is the merge of the models; of rank 3 it is the best."""
    make, kind, settings = MERGED[case]
    torch.manual_seed(0)
    base = save_base(make(), tmp_path / "base")
    folders = [
        trained(kind.from_pretrained(base), tmp_path / f"a{k}", k, **each)[1]
        for k, each in enumerate(settings)
    ]
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(each), "parameters": {"weight": 0.7}} for each in folders],
    }
    if method == "ties":
        config["parameters"] = {"density": 0.6}
        if rank == "exact":
            with pytest.raises(MergeError, match="no rank that is known"):
                merge_checkpoints(config, tmp_path / "lora", rank=rank)
            return
    full = read_result(merge_checkpoints(config, tmp_path / "full").out)
    merge_checkpoints(config, tmp_path / "lora", rank=rank)
    found = loaded(base, tmp_path / "lora", kind)
    before = read_result(base)
    for name, tensor in full.items():
        update = tensor.double() - before[name].double()
        if rank == 3 and update.dim() == 2 and "saved" not in case:
            sizes = torch.linalg.svdvals(update)
            best = float((sizes[3:] ** 2).sum()) ** 0.5
            error = float((found[name].double() - tensor.double()).norm())
            assert error <= best * 1.001 + 1e-5, name
            continue
        differing = ~torch.isclose(found[name], tensor, rtol=1e-4, atol=1e-5)
        allowed = 0 if method == "task_arithmetic" else 2  # entries at a threshold
        assert rank == 3 or int(differing.sum()) <= allowed, name
    if case == "gpt2" and method == "task_arithmetic":
        monkeypatch.chdir(tmp_path)
        again = passthrough(f"{base}+{tmp_path / 'lora'}")
        assert_close(read_result(merge_checkpoints(again, tmp_path / "again").out),
                     {name: found[name] for name in full})  # fmt: skip


def test_convolutions_in_an_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = save_base(Convolutions(), tmp_path / "base")
    modules = ["conv", "point", "line", "volume", "head"]
    folders = [
        trained(Convolutions(), tmp_path / f"a{k}", k, r=2 + k, target_modules=modules)[1]
        for k in range(2)
    ]
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(each), "parameters": {"weight": 0.7}} for each in folders],
    }
    full = read_result(merge_checkpoints(config, tmp_path / "full").out)
    merge_checkpoints(config, tmp_path / "lora", rank="exact")
    model = Convolutions()
    model.load_state_dict(read_result(base))
    made = peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload()
    assert_close(dict(made.state_dict()), full)
