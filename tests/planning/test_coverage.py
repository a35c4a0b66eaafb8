"""What a plan does with tensors that not all models have: copied, left out, or an error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pymerge.checkpoint.types import ModelHeader, Source, TensorInfo
from pymerge.planning.plan import Plan
from pymerge.planning.planner import build_plan
from pymerge.recipe.resolve import read_recipe

Shapes = dict[str, tuple[int, ...]]
E = (40, 8)  # of an embedding


def llama(layers: int = 3, stack: str = "model.layers") -> Shapes:
    found: Shapes = {"model.embed_tokens.weight": E, "model.norm.weight": (8,)}
    for i in range(layers):
        found |= {f"{stack}.{i}.{name}.weight": (8, 8) for name in ("self_attn.q", "mlp.up")}
        found[f"{stack}.{i}.input_layernorm.weight"] = (8,)
    return found


HEADED = llama() | {"lm_head.weight": E}


def planned(
    base: Shapes,
    *others: Shapes,
    configs: tuple[dict[str, Any], ...] = (),
    strict: bool = False,
    method: str = "ties",
    **more: Any,
) -> Plan:
    """Of a merge with the base `base`; models are called base, m1, m2 ..."""
    headers = []
    for k, shapes in enumerate((base, *others)):
        tensors = {name: TensorInfo(name, "float32", shape) for name, shape in shapes.items()}
        config = configs[k] if configs else {"tie_word_embeddings": False}
        headers.append(ModelHeader(f"m{k}" if k else "base", tensors, config))
    names = [header.reference for header in headers]
    recipe: dict[str, Any] = {"merge_method": method, "parameters": {"weight": 1.0}}
    if method == "linear":
        recipe["models"] = [{"model": name} for name in names]
    else:
        recipe |= {"base_model": "base", "models": [{"model": name} for name in names[1:]]}
    return build_plan(replace(read_recipe(recipe | more), strict=strict), headers)


PARTS: dict[str, Shapes] = {
    "mtp": {"mtp.fc.weight": (8, 16), "mtp.layers.0.norm.weight": (8,), "mtp.norm.weight": (8,)},
    "value head": {"v_head.summary.weight": (1, 8), "v_head.summary.bias": (1,)},
    "head": {"lm_head.weight": E},
    "pooler": {"pooler.dense.weight": (8, 8), "pooler.dense.bias": (8,)},
    "classifier": {"score.weight": (3, 8)},
    "final norm": {"final.norm.weight": (8,)},
    "VAE": {"first_stage_model.encoder.down.0.block.0.conv1.weight": (4, 4, 3, 3)},
    "EMA": {"model_ema.decay": (), "model_ema.model_layers0weight": (8, 8)},
    "markers": {"v_pred": (0,), "ztsnr": (0,)},
}


@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_what_the_base_has_alone_is_copied_from_it(part: Shapes, method: str):
    plan = planned(llama() | part, llama(), llama(), method=method)
    assert not plan.problems
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    assert list(tensors) == list(llama() | part)
    for name in part:
        assert tensors[name].sources == (Source(0, name),)
        assert tensors[name].options is None and tensors[name].base is None
        assert tensors[name].method == "copy"
    (note,) = plan.notes
    count = f"{len(part)} tensor{'s' if len(part) > 1 else ''}"
    verb = "are" if len(part) > 1 else "is"
    assert note == f"{count} of base that m1, m2 lack {verb} copied: {', '.join(part)}"


# Of the head there is another rule: test_an_output_layer_is_never_lost.
@pytest.mark.parametrize("part", [part for name, part in PARTS.items() if name != "head"])
def test_what_the_base_lacks_is_left_out(part: Shapes):
    plan = planned(llama(), llama(), llama() | part)
    assert not plan.problems and [tensor.name for tensor in plan.tensors] == list(llama())
    (note,) = plan.notes
    count = f"{len(part)} tensor{'s' if len(part) > 1 else ''}"
    verb = "are" if len(part) > 1 else "is"
    assert note == f"{count} of m2 that base lacks {verb} left out: {', '.join(part)}"


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("base_has_it", [True, False])
def test_strict_makes_it_an_error(part: Shapes, base_has_it: bool):
    models = (llama() | part, llama()) if base_has_it else (llama(), llama() | part)
    (problem,) = planned(*models, strict=True).problems
    assert next(iter(part)) in problem and "strict=True asks for the same" in problem
    assert not planned(llama(), llama(), strict=True).problems


@pytest.mark.parametrize("size", [1, 2000])
def test_more_than_half_of_every_model_is_common(size: int):
    """A part that outweighs the rest: then the models are of different kinds."""
    part = {"vision.embedding.weight": (size, 8)}
    for models in ((llama() | part, llama()), (llama(), llama() | part)):
        problems = planned(*models).problems
        assert bool(problems) == (size == 2000)
        if problems:
            (problem,) = problems
            owner = "base" if "vision.embedding.weight" in models[0] else "m1"
            assert f"what all models have is 4% of {owner}: only where" in problem


@pytest.mark.parametrize(
    ("base", "other"),
    [
        (llama(4), llama(3)),
        (llama(3), llama(4)),
        # Within layers: biases, norms, adapters.
        (llama(), llama() | {f"model.layers.{i}.self_attn.q.bias": (8,) for i in range(3)}),
        (llama() | {f"model.layers.{i}.self_attn.q.bias": (8,) for i in range(3)}, llama()),
        (llama(), llama() | {"model.layers.1.self_attn.q.lora_A.weight": (1, 8)}),
        ({"h.0.attn.c_attn.bias": (3,)} | llama(3, "h"), llama(3, "h")),
        ({n: s for n, s in llama().items() if ".1.mlp" not in n}, llama()),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_layers_are_never_made_of_other_layers(base: Shapes, other: Shapes, backwards: bool):
    (problem,) = planned(*((other, base) if backwards else (base, other))).problems
    assert "layer" in problem and "merge models of one architecture only" in problem


def test_layers_beyond_those_that_the_config_counts_are_no_layers():
    """DeepSeek's prediction of further tokens is `model.layers.61` of 61 layers."""
    config = {"tie_word_embeddings": False, "num_hidden_layers": 3}
    plan = planned(llama(4), llama(3), configs=(config, config))
    assert not plan.problems and len(plan.tensors) == len(llama(4))
    assert "of base that m1 lacks are copied: model.layers.3" in plan.notes[0]
    plan = planned(llama(3), llama(4), configs=(config, config))
    assert not plan.problems and len(plan.tensors) == len(llama(3))


TIED, UNTIED, UNSAID = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {}


@pytest.mark.parametrize(
    ("base", "base_config"), [(llama(), TIED), (llama(), UNSAID), (HEADED, TIED)]
)
def test_an_output_layer_is_never_lost(base: Shapes, base_config: dict[str, Any]):
    """One that a model trained by itself cannot be in a result that ties it."""
    plan = planned(base, HEADED, configs=(base_config, UNTIED))
    (problem,) = plan.problems
    assert "lm_head.weight" in problem and "m1 has trained an output layer of its own" in problem
    assert "tie_word_embeddings" in problem
    for config in (TIED, UNSAID):
        plan = planned(base, HEADED, configs=(base_config, config))
        assert not plan.problems
        assert "lm_head.weight" not in {tensor.name for tensor in plan.tensors}


def test_a_tied_models_embedding_stands_for_its_output_layer():
    plan = planned(HEADED, llama(), configs=(UNTIED, TIED))
    assert not plan.problems
    head = next(tensor for tensor in plan.tensors if tensor.name == "lm_head.weight")
    assert head.sources == (Source(1, "model.embed_tokens.weight"),)
    assert head.base == Source(0, "lm_head.weight")


def test_an_output_layer_that_is_none_of_a_models_own_is_copied():
    """A backbone saved alone: its embedding is no output layer, as the base's config tells."""
    for config in (UNTIED, UNSAID):
        plan = planned(HEADED, llama(), configs=(UNTIED, config))
        head = next(tensor for tensor in plan.tensors if tensor.name == "lm_head.weight")
        assert head.sources == (Source(0, "lm_head.weight"),) and head.method == "copy"
        assert plan.notes == ("1 tensor of base that m1 lacks is copied: lm_head.weight",)


T5 = {"shared.weight": E, "encoder.block.0.w": (8, 8), "decoder.block.0.w": (8, 8)}
T5_COPIES = {"encoder.embed_tokens.weight": E, "decoder.embed_tokens.weight": E}
BART = {"model.shared.weight": E, "model.encoder.layers.0.w": (8, 8)}
BART_COPIES = {"model.encoder.embed_tokens.weight": E, "model.decoder.embed_tokens.weight": E}
WHISPER = {"model.decoder.embed_tokens.weight": E, "model.decoder.layers.0.w": (8, 8)}
BERT = {"bert.embeddings.word_embeddings.weight": E, "cls.predictions.bias": (40,)}
BERT_COPIES = {"cls.predictions.decoder.weight": E, "cls.predictions.decoder.bias": (40,)}
ROBERTA = {"roberta.embeddings.word_embeddings.weight": E, "lm_head.bias": (40,)}


@pytest.mark.parametrize(
    ("model", "copies"),
    [
        (T5, T5_COPIES),
        (T5, T5_COPIES | {"lm_head.weight": E}),
        (BART, BART_COPIES | {"lm_head.weight": E}),
        (WHISPER, {"proj_out.weight": E}),
        (BERT, BERT_COPIES),
        (ROBERTA, {"lm_head.decoder.weight": E, "lm_head.decoder.bias": (40,)}),
    ],
    ids=["t5", "t5 with head", "bart", "whisper", "bert", "roberta"],
)
def test_tied_copies_are_the_tensor_that_they_are_copies_of(model: Shapes, copies: Shapes):
    """Copied from the base they would stay behind while the tensor itself is merged, and
    transformers would load both.
    """
    plan = planned(model, model | copies, configs=(UNSAID, UNSAID))
    assert not plan.problems and {t.name for t in plan.tensors} == set(model)
    assert all(name in " ".join(plan.notes) for name in list(copies)[:3])
    plan = planned(model | copies, model, configs=(UNSAID, UNSAID))
    assert not plan.problems
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    for name, shape in copies.items():
        (source,) = tensors[name].sources
        assert source.tensor in model and model[source.tensor] == shape
        assert tensors[name].base == Source(0, name)
    assert not planned(model, model | copies, configs=(UNSAID, UNSAID), strict=True).problems


@pytest.mark.parametrize(
    ("meant", "copies"),
    [
        (
            "b.bert.embeddings.word_embeddings.weight",
            ["b.cls.predictions.decoder.weight", "b.lm_head.weight"],
        ),
        ("b.shared.weight", ["b.encoder.embed_tokens.weight", "b.decoder.embed_tokens.weight"]),
        ("b.encoder.embed_tokens.weight", ["b.shared.weight"]),
        ("b.model.embed_tokens.weight", ["b.lm_head.weight"]),
        ("b.cls.predictions.bias", ["b.cls.predictions.decoder.bias"]),
    ],
)
@pytest.mark.parametrize("beside", ["", "x."])
def test_of_several_models_in_one_each_copy_is_of_its_own(
    meant: str, copies: list[str], beside: str
):
    """Encoder and decoder of one architecture each have an embedding, of one shape."""
    other = beside + meant.replace("b.", "a.", 1)
    for names in ([other, meant], [meant, other]):
        model: Shapes = {**dict.fromkeys(names, E), "a.0.w": (99, 99)}
        plan = planned(model | dict.fromkeys(copies, E), model, configs=(UNSAID, UNSAID))
        assert not plan.problems
        tensors = {tensor.name: tensor for tensor in plan.tensors}
        for copy in copies:
            assert tensors[copy].sources == (Source(1, meant),)


CONSTANTS: Shapes = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
    "rotary_emb.inv_freq": (4,),
    "model.layers.0.attn.masked_bias": (),
    "model.layers.0.attn.bias": (1, 1, 900, 900),
    "model.layers.0.attention.bias": (1, 1, 900, 900),
    "embeddings.position_ids": (1, 16),
    "embeddings.token_type_ids": (1, 16),
    "model.layers.0.attn.relative_position_index": (900, 900),
    "bn.num_batches_tracked": (),
}


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("strict", [True, False])
def test_constants_may_be_missing_whatever_their_size(name: str, strict: bool):
    whole = llama() | {name: CONSTANTS[name]}
    plan = planned(whole, llama(), strict=strict)
    assert not plan.problems
    copied = next(tensor for tensor in plan.tensors if tensor.name == name)
    assert copied.sources == (Source(0, name),) and copied.options is None
    assert plan.notes == (f"1 constant missing from some models is copied from base: {name}",)
    plan = planned(llama(), whole, strict=strict)
    assert not plan.problems and len(plan.tensors) == len(llama())
    assert plan.notes == (f"left out of the merge, from m1: {name}",)


def test_notes_name_some_and_count_all():
    many = {f"mtp.w{i}": (1,) for i in range(9)}
    for plan in (planned(llama() | many, llama()), planned(llama(), llama() | many)):
        (note,) = plan.notes
        assert note.startswith("9 tensors of ") and note.count("mtp.w") == 4
        assert note.endswith("and 5 others")


def test_what_some_slices_lack():
    """The final norm of the last slice's models."""
    slices = [
        {"sources": [{"model": name, "layer_range": [0, 3]} for name in ("base", "m1")]},
    ]
    base = llama() | PARTS["value head"]
    plan = planned(base, llama(), method="linear", models=None, slices=slices)
    assert not plan.problems and "v_head.summary.bias" in {t.name for t in plan.tensors}
    lacking = {n: s for n, s in llama().items() if n != "model.layers.2.mlp.up.weight"}
    plan = planned(base, lacking, method="linear", models=None, slices=slices)
    assert "model.layers.2.mlp.up.weight" in plan.problems[0]


NORM: Shapes = {
    "bn.weight": (4,),
    "bn.running_mean": (4,),
    "bn.running_var": (4,),
    "running_var": (4,),
}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "breadcrumbs"])
def test_running_statistics_are_averaged(method: str):
    plan = planned(NORM, NORM, NORM, method=method)
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    for name in NORM:
        tensor = tensors[name]
        assert tensor.options is not None
        averaged = (tensor.base, tensor.options.trim, tensor.options.merge) == (
            None,
            "none",
            "weighted_mean",
        )
        assert averaged == ("running" in name)
        assert [source.model for source in tensor.sources] == [1, 2]
    (note,) = plan.notes
    assert note.startswith("bn.running_mean, bn.running_var, running_var are averaged over the")


def test_an_average_of_models_has_its_weights_for_running_statistics_too():
    plan = planned(NORM, NORM, method="linear")
    assert not plan.notes
    assert {tensor.method for tensor in plan.tensors} == {"linear"}
    entries = [{"model": "base", "parameters": {"weight": 1.5}}, {"model": "m1", "parameters": {"weight": -0.5}}]  # fmt: skip
    plan = planned(NORM, NORM, method="linear", models=entries)
    assert {t.name for t in plan.tensors if t.method == "average"} == NORM.keys() - {"bn.weight"}


BUFFERS = ("mlp.gate.e_score_correction_bias", "mlp.expert_bias", "self_attn.k_scale")


@pytest.mark.parametrize("buffer", BUFFERS)
def test_a_buffer_that_a_model_was_saved_without_is_the_bases(buffer: str):
    """Routers balance their experts by a bias that is no parameter; some tools save none."""
    own: Shapes = {f"model.layers.{i}.{buffer}": (4,) for i in (1, 2)}
    plan = planned(llama() | own, llama(), llama() | own)
    assert not plan.problems
    copied = {tensor.name for tensor in plan.tensors if tensor.method == "copy"}
    assert copied == own.keys() and f"base that m1 lacks are copied: {min(own)}" in plan.notes[0]
    (problem,) = planned(llama(), llama() | own).problems  # the result would lose it
    assert "m1 has 2 tensors that base lacks" in problem
    assert problem.endswith("or add these to base where it was saved without them")


def averaged() -> Shapes:
    return HEADED | {f"model_ema.{name}": shape for name, shape in HEADED.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_an_average_beside_a_model_is_no_part_of_its_size(tied: bool):
    """Nor is its output layer the embedding of the model beside it."""
    configs = ({"tie_word_embeddings": tied},) * 2
    plan = planned(averaged(), HEADED, configs=configs)
    assert not plan.problems
    copied = {tensor.name for tensor in plan.tensors if tensor.method == "copy"}
    made = {tensor.name for tensor in plan.tensors}
    assert copied == {name for name in made if name.startswith("model_ema.")} != set()
    assert ("lm_head.weight" in made) == (not tied)
    plan = planned(HEADED, averaged(), configs=({},) * 2)
    assert not plan.problems and {t.name for t in plan.tensors} == HEADED.keys()


def test_an_output_layer_of_a_part_is_not_tied_to_the_models_embedding():
    """The config ties the model's own; that of a part without an embedding is another one."""
    part: Shapes = {"mtp.fc.weight": (8, 16), "mtp.lm_head.weight": E}
    configs = ({"tie_word_embeddings": True},) * 2
    plan = planned(llama() | part, llama() | part, configs=configs)
    assert {tensor.name for tensor in plan.tensors} == (llama() | part).keys()
    plan = planned(llama() | part, llama(), configs=configs)
    assert {t.name for t in plan.tensors if t.method == "copy"} == part.keys()
