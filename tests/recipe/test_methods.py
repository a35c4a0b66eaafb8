"""The method table, the resolution of parameters per tensor, layer numbers, and mergekit's own
answers.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pymerge.checkpoint.types import ModelHeader, TensorInfo
from pymerge.errors import ConfigError
from pymerge.methods import METHODS, find_method
from pymerge.methods._settings import SettingError, parse_setting
from pymerge.ops.ties.run import run_tensor
from pymerge.recipe.layers import Layers, comes_first
from pymerge.recipe.resolve import read_recipe
from pymerge.rules.ties import resolve_options

GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit"
WEIGHT = METHODS["ties"].parameter("weight")
NORMALIZE = METHODS["ties"].parameter("normalize")


def header(names, reference="m"):
    return ModelHeader(reference, {name: TensorInfo(name, "float32", (2,)) for name in names}, {})


def llama(layers, extra=()):
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    names += [
        f"model.layers.{i}.{part}.weight"
        for i in range(layers)
        for part in ("mlp.up", "self_attn.q")
    ]
    return [*names, "model.norm.weight", *extra]


def tasks_of(config, *headers, **options):
    recipe = read_recipe(config, **options)
    return {task.name: task for task in recipe.tasks(headers)}


def with_global(method, models=("a", "b"), base=None, **parameters):
    config = {
        "merge_method": method,
        "models": [{"model": m} for m in models],
        "parameters": parameters,
    }
    return config if base is None else {**config, "base_model": base}


def merged(recipe):
    """Every task of a recipe over its own files, by the op."""
    states = [load_file(model) for model in recipe.models]
    headers = [
        ModelHeader(
            m, {k: TensorInfo(k, str(v.dtype), tuple(v.shape)) for k, v in state.items()}, {}
        )
        for m, state in zip(recipe.models, states, strict=True)
    ]
    result, scale = {}, {}
    for task in recipe.tasks(headers):
        models = [states[s.model][s.tensor] for s in task.sources]
        base = None if task.base is None else states[task.base.model][task.base.tensor]
        out = torch.full_like(models[0], torch.nan)
        run_tensor(
            models,
            base,
            task.options,
            task.options.rule(out.numel(), task.name),
            out,
            "auto",
            task.name,
        )
        result[task.name] = out
        scale[task.name] = torch.stack(
            [x.abs() for x in (*models, *([] if base is None else [base]))]
        ).amax(0)
    return result, scale


# In units of the last place of the largest input of each element. mergekit's linear fuses multiply
# and add and multiplies by fp32 weights summed in fp32; its rescale sums norms in fp32. Everything
# else is the same operations in the same order.
ULPS = {"linear": 2, "linear_nonorm": 2, "ties_rescale": 8}


# Of the other methods, tests/compat/test_golden.py runs the files as people do.
BY_TIES = [
    path
    for path in sorted(GOLDEN.glob("*.yml"))
    if METHODS[path.read_text().split()[1]].op == "ties"
]


@pytest.mark.parametrize("path", BY_TIES, ids=lambda path: path.stem)
def test_golden(path):
    result, scale = merged(read_recipe(path))
    expected = load_file(GOLDEN / f"expected_{path.stem}.safetensors")
    assert set(result) == set(expected)
    for name, tensor in expected.items():
        allowed = ULPS.get(path.stem, 0) * 2.0**-23 * scale[name]
        assert ((result[name] - tensor).abs() <= allowed).all(), name


def test_golden_covers_the_files():
    assert len(list(GOLDEN.glob("*.yml"))) == len(list(GOLDEN.glob("expected_*"))) == 25
    assert len(BY_TIES) == 11


# The table


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.op == "ties"])
def test_every_method_stands_for_valid_options(name):
    method = METHODS[name]
    values = {p.name: 0.5 if p.kind == "number" else True for p in method.parameters}
    shared = {p.name: values[p.name] for p in method.parameters if p.scope == "shared"}
    resolve_options(2, **method.options(shared, [values, values]))


def test_defaults_are_mergekits():
    def defaults(name):
        return {p.name: p.default for p in METHODS[name].parameters if p.name != "weight"}

    common = {"density": 1.0, "lambda": 1.0, "int8_mask": False}
    assert defaults("ties") == {**common, "normalize": True, "rescale": False}
    assert defaults("task_arithmetic") == {**common, "normalize": False, "rescale": False}
    for name in ("dare_ties", "dare_linear"):
        assert defaults(name) == {**common, "normalize": False, "rescale": True}
    for name in ("breadcrumbs", "breadcrumbs_ties"):
        assert defaults(name) == {**common, "normalize": False, "rescale": False, "gamma": 0.01}
    for name, normalize in (("della", True), ("della_linear", False)):
        assert defaults(name) == {
            **common,
            "normalize": normalize,
            "rescale": True,
            "epsilon": 0.15,
        }
    assert defaults("linear") == {"normalize": True}
    assert defaults("passthrough") == {"scale": None}


def test_options_of_methods():
    def options(method, **parameters):
        config = with_global(
            method, base=None if method == "linear" else "c", weight=1, **parameters
        )
        names = [["x.weight"]] * (2 if method == "linear" else 3)
        return tasks_of(config, *map(header, names), seed=7)["x.weight"].options

    dare = options("dare_ties", density=0.3)
    assert (dare.trim, dare.elect, dare.rescale, dare.merge) == ("random", "sum", "l1", "sum")
    assert (dare.densities, dare.seed) == ((0.3, 0.3), 7)
    assert options("dare_ties", density=0.3, rescale=False).rescale == "none"
    assert options("breadcrumbs", gamma=0.2).gammas == (0.2, 0.2)
    assert options("ties", normalize="no", **{"lambda": "2e0"}).merge == "sum"
    assert options("ties", **{"lambda": "2e0"}).scaling == 2.0
    assert options("linear").merge == "weighted_mean"


def test_find_method():
    assert find_method("ties").title == "TIES"
    with pytest.raises(ConfigError, match="did you mean 'dare_ties'"):
        find_method("dareties")
    for bad in (None, 3, ["ties"], {}):
        with pytest.raises(ConfigError, match="is not one of"):
            find_method(bad)


# Settings


def test_gradients_are_piecewise_linear():
    setting = parse_setting(WEIGHT, [0, 1, "5e-1"])
    assert [setting.value("x", t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.75, 0.5]
    assert setting.varies and setting.always


def test_gradients_of_flags_take_the_left_value():
    setting = parse_setting(NORMALIZE, [True, False, True])
    assert [setting.value("x", t) for t in (0, 0.49, 0.5, 0.99, 1)] == [
        True,
        True,
        False,
        False,
        True,
    ]


def test_filters_match_parts_of_names_and_the_first_counts():
    setting = parse_setting(
        WEIGHT, [{"filter": "mlp", "value": [0, 1]}, {"filter": "*", "value": 3}, {"value": 4}]
    )
    assert setting.value("layers.0.mlp.w", 0.5) == 0.5
    assert setting.value("layers.0.attn.w", 0.5) == 3
    assert parse_setting(WEIGHT, {"filter": "mlp", "value": 1}).value("attn", 0) is None
    assert not parse_setting(WEIGHT, {"filter": "mlp", "value": 1}).always


def test_setting_problems_have_their_place():
    with pytest.raises(SettingError) as caught:
        parse_setting(WEIGHT, [{"filter": 3, "value": [1, "x"]}, {"filter": "y"}])
    assert [at for at, _ in caught.value.problems] == [(0, "filter"), (0, "value", 1), (1,)]


# Precedence


def test_precedence_in_slices_and_fall_through():
    config = {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {
                        "model": "a",
                        "layer_range": [0, 1],
                        "parameters": {"weight": {"filter": "mlp", "value": 1}},
                    },
                    {"model": "b", "layer_range": [0, 1]},
                ],
                "parameters": {"weight": {"filter": "attn", "value": 2}},
            },
            {
                "sources": [
                    {"model": "a", "layer_range": [1, 2]},
                    {"model": "b", "layer_range": [1, 2]},
                ],
                "parameters": {"normalize": False},
            },
        ],
        "parameters": {"weight": 3, "normalize": True},
    }
    tasks = tasks_of(config, header(llama(2)), header(llama(2)))
    weights = {name: task.options.weights for name, task in tasks.items()}
    assert weights["model.layers.0.mlp.up.weight"] == (1, 3)
    assert weights["model.layers.0.self_attn.q.weight"] == (2, 2)
    assert weights["model.layers.1.mlp.up.weight"] == (3, 3)
    assert tasks["model.layers.0.mlp.up.weight"].options.merge == "weighted_mean"
    assert tasks["model.layers.1.mlp.up.weight"].options.merge == "sum"
    # Embeddings belong to the first slice, norm and head to the last.
    assert tasks["model.embed_tokens.weight"].options.merge == "weighted_mean"
    assert tasks["model.norm.weight"].options.merge == "sum"
    assert tasks["lm_head.weight"].options.merge == "sum"


def test_module_level_is_between_slice_and_top():
    config = {
        "merge_method": "linear",
        "modules": {"m": {"models": [{"model": "a"}], "parameters": {"weight": 2}}},
        "parameters": {"weight": 3},
    }
    assert tasks_of(config, header(["x"]))["x"].options.weights == (2,)


def test_gradients_over_layers():
    config = with_global("linear", models=("a",), weight=[0.5, 1.5])
    tasks = tasks_of(config, header(llama(3)))
    weights = {name: task.options.weights[0] for name, task in tasks.items()}
    assert [weights[f"model.layers.{i}.mlp.up.weight"] for i in range(3)] == [0.5, 1.0, 1.5]
    assert weights["lm_head.weight"] == weights["model.embed_tokens.weight"] == 0.5
    one = tasks_of(config, header(llama(1)))
    assert one["model.layers.0.mlp.up.weight"].options.weights == (1.5,)


# Inputs


def test_base_among_the_models_is_no_task_vector():
    config = with_global("ties", models=("a", "c", "b"), base="c", weight=1)
    recipe = read_recipe(config)
    (task,) = recipe.tasks([header(["x"])] * 3)
    assert [recipe.models[s.model] for s in task.sources] == ["a", "b"]
    assert recipe.models[task.base.model] == "c"
    alone = read_recipe(with_global("ties", models=("c",), base="c")).tasks([header(["x"])])
    assert alone[0].options is None and alone[0].sources[0].model == 0


def test_base_model_of_linear_is_one_more_input():
    recipe = read_recipe(with_global("linear", models=("a", "b"), base="c", weight=1))
    (task,) = recipe.tasks([header(["x"])] * 3)
    assert [recipe.models[s.model] for s in task.sources] == ["a", "b", "c"]
    assert task.base is None and task.options.weights == (1, 1, 1)
    assert recipe.models[recipe.base] == "c"


def test_passthrough_copies_unless_scaled():
    (task,) = read_recipe(with_global("passthrough", models=("a",))).tasks([header(["x"])])
    assert task.options is None
    config = with_global("passthrough", models=("a",), scale=[{"filter": "up", "value": 0}])
    plain, scaled = read_recipe(config).tasks([header(["down", "up"])])
    assert plain.options is None
    assert (scaled.options.weights, scaled.options.merge) == ((0,), "sum")


def test_weights_that_no_filter_gives():
    config = with_global("linear", models=("a",), weight=[{"filter": "mlp", "value": 1}])
    with pytest.raises(
        ConfigError,
        match=r"weight has no value for a in lm_head.weight, .* and 1 other: no filter matches",
    ):
        tasks_of(config, header(llama(1, extra=["other.weight"])))


@pytest.mark.parametrize("varies", [False, True])  # the recipe alone shows it, or each tensor
def test_linear_with_weights_that_sum_to_zero(varies):
    config = {
        "merge_method": "linear",
        "models": [
            {"model": m, "parameters": {"weight": [w, w] if varies else w}}
            for m, w in (("a", 0.5), ("b", -0.5))
        ],
    }
    where = "x" if varies else "configuration"
    with pytest.raises(
        ConfigError, match=f"{where}: the weights of linear sum to 0, so there is no average"
    ):
        tasks_of(config, header(["x"]), header(["x"]))
    config["parameters"] = {"normalize": False}
    assert tasks_of(config, header(["x"]), header(["x"]))["x"].options.merge == "sum"


# Slices


def stacked(*ranges):
    slices = [{"sources": [{"model": model, "layer_range": list(ends)}]} for model, ends in ranges]
    return {"merge_method": "passthrough", "slices": slices}


def test_slices_renumber_layers():
    recipe = read_recipe(stacked(("a", (0, 2)), ("b", (1, 3)), ("a", (0, 1))))
    assert (recipe.models, recipe.sliced, recipe.num_layers) == (("a", "b"), True, 5)
    tasks = {
        t.name: (t.sources[0].model, t.sources[0].tensor)
        for t in recipe.tasks([header(llama(3))] * 2)
    }
    assert set(tasks) == set(llama(5))
    up = [tasks[f"model.layers.{i}.mlp.up.weight"] for i in range(5)]
    assert up == [
        (m, f"model.layers.{i}.mlp.up.weight") for m, i in ((0, 0), (0, 1), (1, 1), (1, 2), (0, 0))
    ]


def test_slices_take_the_ends_from_the_first_and_the_last_slice():
    recipe = read_recipe(stacked(("a", (0, 1)), ("b", (0, 1))))
    tasks = {t.name: t.sources[0].model for t in recipe.tasks([header(llama(1))] * 2)}
    assert tasks["model.embed_tokens.weight"] == 0
    assert tasks["model.norm.weight"] == tasks["lm_head.weight"] == 1


def test_filters_see_each_inputs_own_layer():
    config = {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {"model": "a", "layer_range": [0, 1]},
                    {"model": "b", "layer_range": [1, 2]},
                ]
            },
        ],
        "parameters": {"weight": [{"filter": "layers.1.", "value": 5}, {"value": 1}]},
    }
    tasks = tasks_of(config, header(llama(2)), header(llama(2)))
    assert tasks["model.layers.0.mlp.up.weight"].options.weights == (1, 5)


def test_slice_problems():
    with pytest.raises(ConfigError, match=r"layer_range \[2, 4\] of a: it has 3 layers"):
        tasks_of(stacked(("a", (2, 4))), header(llama(3)))
    with pytest.raises(ConfigError, match="no tensor name of a has a layer number"):
        tasks_of(stacked(("a", (0, 1))), header(["x.weight"]))
    with pytest.raises(ConfigError, match=r"2 lists of layers \(enc.layers, dec.layers\)"):
        tasks_of(stacked(("a", (0, 1))), header(["enc.layers.0.w", "dec.layers.0.w"]))


# Layer numbers


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["model.layers.0.a", "model.layers.1.a", "model.norm.weight"], {"model.layers": 2}),
        (["encoder.layer.0.a.b"], {"encoder.layer": 1}),
        (["transformer.h.0.mlp.0.w", "transformer.h.1.mlp.2.w"], {"transformer.h": 2}),
        (["blocks.0.w", "blocks.2.w"], {"blocks": 3}),
        (["0.auto_model.encoder.layer.0.w", "2.linear.weight"], {"0.auto_model.encoder.layer": 1}),
        (["m.layers.0.experts.0.w", "m.layers.0.experts.1.w"], {"m.layers": 1}),
        (["encoder.block.0.layer.1.w", "encoder.block.1.layer.0.w"], {"encoder.block": 2}),
        (["classifier.0.weight", "classifier.2.weight"], {}),
        (["stages.0.w", "stages.1.w"], {"stages": 2}),
        (["w.0", "layers.x.w", "layers.-1.w", "layers.²." + "w"], {}),
    ],
)
def test_layers(names, counts):
    assert Layers(names).counts == counts


def test_places():
    layers = Layers(llama(3))
    assert layers.place("lm_head.weight") is None
    place = layers.place("model.layers.2.mlp.up.weight")
    assert place.renumbered(7) == "model.layers.7.mlp.up.weight"
    assert [layers.position(n) for n in ("model.layers.1.mlp.up.weight", "model.norm.weight")] == [
        0.5,
        0,
    ]


def test_what_comes_before_the_layers():
    before = [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "bert.embeddings.LayerNorm.weight",
    ]
    after = [
        "model.norm.weight",
        "lm_head.weight",
        "bert.pooler.dense.bias",
        "embed_out.weight",
        "score.weight",
    ]
    assert [comes_first(name) for name in before + after] == [True] * 3 + [False] * 5


# Recipes


def test_paths_are_looked_up_here_then_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "sub" / "a").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    path = tmp_path / "sub" / "r.yml"
    path.write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: b}, {model: org/c@v1}]\nparameters:"
        " {weight: 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe("sub/r.yml")
    assert recipe.models == (str(Path("sub/a")), "b", "org/c@v1")
    (tmp_path / "a").mkdir()
    assert read_recipe("sub/r.yml").models[0] == "a"


def test_recipe_fields():
    config = with_global("ties", base="c", weight=1)
    recipe = read_recipe(
        {**config, "dtype": "float16", "out_dtype": "torch.bfloat16", "tokenizer_source": "t"}
    )
    assert (recipe.dtype, recipe.out_dtype, recipe.method) == ("float16", "bfloat16", "ties")
    assert recipe.models[recipe.tokenizer] == "t" and recipe.models[recipe.base] == "c"
    assert read_recipe({**config, "tokenizer_source": "base"}).tokenizer == recipe.base
    assert read_recipe(config).tokenizer is None
    assert "merge_method: ties" in recipe.text


def test_notes_are_warnings():
    config = with_global("linear", models=("a",), weight=1, density=0.2)
    with pytest.warns(UserWarning, match="density has no effect with merge_method linear"):
        read_recipe(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_recipe(with_global("ties", base="c", weight=1, int8_mask=True))
