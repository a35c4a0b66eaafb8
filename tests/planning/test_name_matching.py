"""Models that name the same tensors differently are matched, where one way of doing so is right."""

from __future__ import annotations

from typing import Any

import pytest

from pymerge.checkpoint.types import ModelHeader, Source, TensorInfo
from pymerge.messages.prefixes import prefixes_between
from pymerge.planning.name_matching import Matched, match_names
from pymerge.planning.plan import Plan
from pymerge.planning.planner import build_plan
from pymerge.recipe.resolve import read_recipe

Shapes = dict[str, tuple[int, ...]]


def header(name: str, shapes: Shapes, **config: Any) -> ModelHeader:
    tensors = {key: TensorInfo(key, "float32", shape) for key, shape in shapes.items()}
    return ModelHeader(name, tensors, config)


def matched(base: Shapes, other: Shapes) -> tuple[dict[str, str], Matched]:
    """The base's name of each tensor of the other that has another name, and the match."""
    found = match_names([header("base", base), header("ft", other)], 0)
    assert not found.stored[0]
    return {mine: its for its, mine in found.stored[1].items()}, found


def planned(*models: Shapes, **more: Any) -> Plan:
    headers = [header(f"m{k}", shapes) for k, shapes in enumerate(models)]
    entries = [{"model": each.reference, "parameters": {"weight": 1.0}} for each in headers[1:]]
    recipe = {"merge_method": "ties", "base_model": "m0", "models": entries, **more}
    return build_plan(read_recipe(recipe), headers)


def blocks(stack: str, count: int = 3, size: int = 8) -> Shapes:
    found: Shapes = {}
    for i in range(count):
        found |= {f"{stack}.{i}.attn.weight": (size, size), f"{stack}.{i}.attn.bias": (size,)}
        found |= {f"{stack}.{i}.mlp.weight": (2 * size, size)}
    return found


def renamed(shapes: Shapes, old: str, new: str) -> Shapes:
    return {new + n.removeprefix(old) if n.startswith(old) else n: s for n, s in shapes.items()}


GPT: Shapes = {"wte.weight": (20, 8), "wpe.weight": (16, 8), **blocks("h"), "ln_f.weight": (8,)}
LLAMA: Shapes = {
    "model.embed_tokens.weight": (20, 8),
    **blocks("model.layers"),
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
BERT: Shapes = {
    "bert.embeddings.word_embeddings.weight": (20, 8),
    **blocks("bert.encoder.layer"),
    "cls.predictions.bias": (20,),
}


@pytest.mark.parametrize("wrapper", ["transformer.", "module.", "_orig_mod.", "model.model.", "x."])
@pytest.mark.parametrize("added", [True, False], ids=["given", "taken"])
@pytest.mark.parametrize("shapes", [GPT, LLAMA, BERT], ids=["gpt", "llama", "bert"])
def test_one_prefix_of_all_names(shapes: Shapes, added: bool, wrapper: str):
    long = {wrapper + name: shape for name, shape in shapes.items()}
    base, other = (long, shapes) if added else (shapes, long)
    names, found = matched(base, other)
    assert names == dict(zip(other, base, strict=True))
    assert list(found.headers[1].tensors) == list(base)
    (note,) = found.notes
    assert note.startswith(f"ft has other names than base for {len(base)} tensors")
    assert note.endswith(f"matched {'with' if added else 'without'} the prefix '{wrapper}'")


@pytest.mark.parametrize(
    ("base", "other"),
    [
        # A backbone that was saved alone beside one with a head, and the other way round.
        (LLAMA, {n.removeprefix("model."): s for n, s in LLAMA.items() if n != "lm_head.weight"}),
        ({n.removeprefix("model."): s for n, s in LLAMA.items()}, LLAMA),
        (BERT, renamed(BERT, "bert.", "")),
        (renamed(BERT, "bert.", ""), {**BERT, "classifier.weight": (2, 8)}),
        (BERT, renamed(BERT, "bert.", "0.auto_model.")),
        (renamed(BERT, "bert.", "roberta."), BERT),
        # A language model alone, and inside of one with vision.
        ({**renamed(LLAMA, "", "language_model."), "vision.weight": (8, 8)}, LLAMA),
        (LLAMA, {**renamed(LLAMA, "model.", "model.language_model."), "model.visual.x": (9, 9)}),
        # Some more rows of the vocabulary.
        (
            GPT,
            {"transformer." + n: s for n, s in GPT.items()} | {"transformer.wte.weight": (21, 8)},
        ),
    ],
)
def test_one_prefix_where_some_names_have_none(base: Shapes, other: Shapes):
    names, found = matched(base, other)
    shared = base.keys() & found.headers[1].tensors.keys()
    assert len(shared) == len(base.keys() - {"lm_head.weight", "vision.weight"}) or len(
        shared
    ) == len(base)
    assert all(base[its][1:] == other[mine][1:] for mine, its in names.items() if its in base)
    assert len(found.notes) == 1 and "prefix" in found.notes[0]


VISION: Shapes = {
    **renamed({n: s for n, s in LLAMA.items() if n[:3] != "lm_"}, "", "language_model."),
    "language_model.lm_head.weight": (20, 8),
    **blocks("vision_tower.vision_model.encoder.layers", 2, 6),
    "multi_modal_projector.mm_input_projection_weight": (6, 8),
}


def newer(shapes: Shapes) -> Shapes:
    """As transformers names these tensors since 4.52."""
    found = renamed(shapes, "language_model.lm_head", "lm_head")
    found = renamed(found, "language_model.model", "model.language_model")
    found = renamed(found, "vision_tower", "model.vision_tower")
    return renamed(found, "multi_modal_projector", "model.multi_modal_projector")


MIXTRAL: Shapes = {
    "model.embed_tokens.weight": (20, 8),
    **{f"model.layers.{i}.block_sparse_moe.gate.weight": (80, 8) for i in range(3)},
    **{f"model.layers.{i}.self_attn.q_proj.weight": (8, 8) for i in range(3)},
}
VIT: Shapes = {
    f"vit.encoder.layer.{i}.{name}.weight": shape
    for i in range(3)
    for name, shape in {
        "attention.attention.query": (8, 8),
        "attention.attention.key": (8, 8),
        "attention.output.dense": (8, 8),
        "intermediate.dense": (16, 8),
        "output.dense": (8, 16),
        "layernorm_before": (8,),
    }.items()
}
VIT_5: Shapes = {
    f"vit.layers.{i}.{name}.weight": shape
    for i in range(3)
    for name, shape in {
        "attention.q_proj": (8, 8),
        "attention.k_proj": (8, 8),
        "attention.o_proj": (8, 8),
        "mlp.fc1": (16, 8),
        "mlp.fc2": (8, 16),
        "layernorm_before": (8,),
    }.items()
}
PEFT: Shapes = {
    **{f"h.{i}.attn.base_layer.{name}": (8, 8) for i in range(3) for name in ("weight", "bias")},
    "score.modules_to_save.default.weight": (3, 8),
}
SWIN: Shapes = {
    f"swin.encoder.layers.0.blocks.{i}.attention.self.{name}": (8, 8)
    for i in range(3)
    for name in ("query.weight", "value.weight", "relative_position_bias_table")
}
SWIN_5: Shapes = {
    f"swin.encoder.layers.0.blocks.{i}.attention.{name}": (8, 8)
    for i in range(3)
    for name in (
        "q_proj.weight",
        "v_proj.weight",
        "relative_position_bias.relative_position_bias_table",
    )
}
BEIT: Shapes = {
    f"beit.encoder.layer.{i}.attention.attention.{table}.{table}_table": (8, 2)
    for i in range(3)
    for table in ("relative_position_bias",)
}
GRANITE: Shapes = {
    f"model.layers.{i}.block_sparse_moe.{name}.weight": shape
    for i in range(3)
    for name, shape in {
        "input_linear": (2, 16, 8),
        "output_linear": (2, 8, 8),
        "router.layer": (2, 8),
    }.items()
}
GRANITE_5: Shapes = {
    f"model.layers.{i}.block_sparse_moe.{name}": shape
    for i in range(3)
    for name, shape in {
        "experts.gate_up_proj": (2, 16, 8),
        "experts.down_proj": (2, 8, 8),
        "router.weight": (2, 8),
    }.items()
}
OLD_BERT: Shapes = {f"encoder.layer.{i}.LayerNorm.{n}": (8,) for i in range(3) for n in ("gamma", "beta")}  # fmt: skip
CONV: Shapes = {"conv.weight_g": (1, 1, 8), "conv.weight_v": (4, 4, 8), "conv.bias": (4,)}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (VISION, newer(VISION)),
        (VISION, {f"module.{name}": shape for name, shape in newer(VISION).items()}),
        (
            {"visual.blocks.0.x": (8, 8), **LLAMA},
            {
                "model.visual.blocks.0.x": (8, 8),
                **renamed(LLAMA, "model.", "model.language_model."),
            },
        ),
        (LLAMA, {name.replace("attn", "attn._orig_mod"): s for name, s in LLAMA.items()}),
        (LLAMA, {name.replace("mlp", "_checkpoint_wrapped_module.mlp"): s for name, s in LLAMA.items()}),
        (LLAMA, {"_fsdp_wrapped_module." + name.replace("mlp", "_fsdp_wrapped_module.mlp"): s for name, s in LLAMA.items()}),
        (MIXTRAL, {name.replace("block_sparse_moe", "mlp"): s for name, s in MIXTRAL.items()}),
        (VIT, VIT_5),
        (VIT, renamed(VIT_5, "vit.", "")),
        (VISION, {f"module.{name}": shape for name, shape in VISION.items()}),
        (newer(VISION), {f"module.{name}": shape for name, shape in VISION.items()}),
        (LLAMA, {f"base_model.model.{n.replace('lm_head.', 'lm_head.modules_to_save.default.')}": s for n, s in LLAMA.items()}),
        (PEFT, {n.replace("base_layer.", "").replace("modules_to_save.default.", ""): s for n, s in PEFT.items()}),
        (SWIN, SWIN_5),
        (BEIT, {n.replace("beit.encoder.layer", "layers").replace("attention.attention.rel", "rel"): s for n, s in BEIT.items()}),
        (GRANITE, GRANITE_5),
        (OLD_BERT, {n.replace("gamma", "weight").replace("beta", "bias"): s for n, s in OLD_BERT.items()}),
        (CONV, renamed(renamed(CONV, "conv.weight_g", "conv.parametrizations.weight.original0"), "conv.weight_v", "conv.parametrizations.weight.original1")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backwards", [False, True])
def test_known_conversions(one: Shapes, other: Shapes, backwards: bool):
    base, ft = (other, one) if backwards else (one, other)
    names, found = matched(base, ft)
    assert list(found.headers[1].tensors) == list(base)
    assert [base[its] for its in names.values()] == [ft[mine] for mine in names]
    assert len(found.notes) == 1
    assert "known conversions" in found.notes[0] or "prefix" in found.notes[0]


@pytest.mark.parametrize(
    ("base", "other"),
    [
        (GPT, GPT),
        (GPT, dict(reversed(GPT.items()))),
        (GPT, {**GPT, "v_head.weight": (1, 8)}),
        ({**GPT, "mtp.weight": (8, 8)}, GPT),
        # A half or less: nobody knows.
        ({**GPT, "other.weight": (999, 99)}, {"transformer." + n: s for n, s in GPT.items()}),
        (GPT, {"transformer." + n: (2 * s[0], *s[1:]) for n, s in GPT.items()}),
        # Two towers of one shape: either could be the one that is here.
        ({**blocks("left.layers"), **blocks("right.layers"), "rest": (2,)}, blocks("layers", 3)),
        (
            {"a.x": (9,), "b.x": (9,), "a.y": (9,), "b.y": (9,)},
            {"x": (9,), "y": (9,)},
        ),
        # Another layer or expert of the same shapes.
        (blocks("layers", 1), renamed(blocks("layers", 1), "layers.0", "layers.1")),
        ({"l.0.experts.0.w": (9,), "e": (2,)}, {"l.0.experts.7.w": (9,), "e": (2,)}),
        # Deeper than modules are; to try all prefixes with all would take days.
        ({"a." * 5000 + "w": (9,)}, {"b." * 5000 + "w": (9,)}),
    ],
)
def test_nothing_is_guessed(base: Shapes, other: Shapes):
    names, found = matched(base, other)
    assert not names and not found.notes
    assert found.headers[1].tensors.keys() == other.keys()


def test_the_plan_reads_the_files_names_and_writes_the_bases():
    other = {"transformer." + name: shape for name, shape in GPT.items()}
    plan = planned(GPT, other, GPT)
    assert not plan.problems and len(plan.notes) == 2
    assert [tensor.name for tensor in plan.tensors] == list(GPT)
    for tensor in plan.tensors:
        first = Source(1, f"transformer.{tensor.name}")
        assert tensor.sources == (first, Source(2, tensor.name))
        assert tensor.base == Source(0, tensor.name)
        assert tensor.key_name == tensor.name


def test_filters_mean_the_bases_names():
    weight = [{"filter": "transformer.", "value": 0.0}, {"value": 1.0}]
    entry = {"model": "m1", "parameters": {"weight": weight}}
    other = {"transformer." + name: shape for name, shape in GPT.items()}
    for models, value in (((GPT, other), 1.0), ((other, GPT), 0.0)):
        for tensor in planned(*models, models=[entry]).tensors:
            assert tensor.options is not None and tensor.options.weights == (value,)


def test_slices_of_models_with_another_prefix():
    other = {"transformer." + n: s for n, s in {**GPT, **blocks("h", 4)}.items()}
    slices = [
        {"sources": [{"model": f"m{k}", "layer_range": [0, 3]} for k in range(2)]},
        {"sources": [{"model": "m1", "layer_range": [3, 4]}]},
    ]
    headers = [header("m0", GPT), header("m1", other)]
    recipe = {"merge_method": "linear", "parameters": {"weight": 1.0}, "slices": slices}
    plan = build_plan(read_recipe(recipe), headers)
    assert not plan.problems
    last = {t.name: t.sources for t in plan.tensors}["h.3.mlp.weight"]
    assert last == (Source(1, "transformer.h.3.mlp.weight"),)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model.layers.0.", "model.layer.1."),
        ("model.layers.0.", "h.2."),
        ("towers.0.layers.1.", "tower.1.layers.1."),
        ("model.layers.0.", "model.layers.3."),
    ],
)
def test_layers_of_other_numbers_are_never_matched(one: str, other: str):
    """Whatever else differs in the prefix: a model that was cut to its second layer is not merged
    with one that was cut to its first.
    """
    block: Shapes = {"attn.weight": (8, 8), "mlp.weight": (16, 8), "norm.weight": (8,)}
    base = {"embed.weight": (2, 8), **{one + name: shape for name, shape in block.items()}}
    model = {"embed.weight": (2, 8), **{other + name: shape for name, shape in block.items()}}
    assert matched(base, model)[0] == {}
    assert prefixes_between(base, model) is None
    same = one.replace("model.", "m.").replace("towers", "t")  # which no number speaks against
    model = {"embed.weight": (2, 8), **{same + name: shape for name, shape in block.items()}}
    assert len(matched(base, model)[0]) == 3
