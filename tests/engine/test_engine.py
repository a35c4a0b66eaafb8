"""Merged folders: the bits are the reference's, for every way of cutting, reading and counting
threads.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import (
    CONFIG,
    State,
    assert_same,
    expected,
    family,
    merge_in,
    read_result,
    recipe,
    write_family,
    write_model,
    write_sharded,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pymerge.checkpoint.memory import Region
from pymerge.checkpoint.stored import InputFile
from pymerge.checkpoint.types import ModelHeader, Source
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.engine.sizes import Sizes
from pymerge.recipe.model import MergeRecipe, TensorTask
from pymerge.rules.ties import TiesOptions, resolve_options

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.6},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1},
}


SIZES = {
    "whole": Sizes(),  # blocks larger than any tensor
    # Most tensors are cut into parts, or made in memory of their own.
    "cut": Sizes(block=256, blocks=2, ahead=4000),
    # Inputs are read into memory, with room for one or two tensors.
    "read": Sizes(block=256, blocks=2, ahead=4000, ring=4096, piece=300),
}


@pytest.fixture(params=SIZES)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sizes:
    monkeypatch.setenv("PYMERGE_IO", "read" if request.param == "read" else "mmap")
    return SIZES[request.param]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return write_family(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_methods(tmp_path: Path, folders: list[Path], sizes: Sizes, method: str) -> None:
    config = recipe(method, folders, **METHODS[method])
    merge_in(sizes, config, tmp_path / "out", seed=5)
    states = family()
    wanted = expected(config, order(config, folders, states), seed=5)
    assert_same(read_result(tmp_path / "out"), wanted)


def order(config: Any, folders: list[Path], states: list[State]) -> list[State]:
    """The states as the recipe numbers its models."""
    from pymerge.engine.merge import _recipe

    made, _ = _recipe(config, 0, True)
    by_name = dict(zip(map(str, folders), states, strict=True))
    return [by_name[name] for name in made.models]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("out_dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(tmp_path: Path, dtype: str, out_dtype: str, sizes: Sizes) -> None:
    folders = write_family(tmp_path, dtype=getattr(torch, dtype))
    config = recipe("ties", folders, density=0.3) | {"out_dtype": out_dtype}
    merge_in(sizes, config, tmp_path / "out")
    wanted = expected(config, order(config, folders, family(dtype=getattr(torch, dtype))))
    assert all(t.dtype == getattr(torch, out_dtype) for t in wanted.values())
    assert_same(read_result(tmp_path / "out"), wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == out_dtype


def test_models_of_different_dtypes_and_forms(tmp_path: Path, sizes: Sizes) -> None:
    base, one, two, three = family(3, torch.float32)
    one = {name: t.half() for name, t in one.items()}
    two = {name: t.bfloat16() for name, t in two.items()}
    three = {name: (t.t().contiguous().t() if t.dim() == 2 else t) for name, t in three.items()}
    folders = [write_model(tmp_path / "base", base), write_sharded(tmp_path / "m1", one)]
    save_file(two, tmp_path / "m2.safetensors")
    torch.save(three, tmp_path / "m3.pt")
    folders += [tmp_path / "m2.safetensors", tmp_path / "m3.pt"]
    config = recipe("ties", folders, density=0.5)
    merge_in(sizes, config, tmp_path / "out", out_shard_size=3000)
    assert_same(read_result(tmp_path / "out"), expected(config, [base, one, two, three]))


def test_headers_of_odd_length(tmp_path: Path, sizes: Sizes) -> None:
    """Old files: the data begins anywhere, so no element lies at a multiple of its size."""
    states = family()
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    for number, folder in enumerate(folders):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        pad = b" " * (2 * number + 1)
        header = (length + len(pad)).to_bytes(8, "little") + content[8 : 8 + length] + pad
        path.write_bytes(header + content[8 + length :])
    config = recipe("ties", folders, density=0.5)
    merge_in(sizes, config, tmp_path / "out")
    assert_same(read_result(tmp_path / "out"), expected(config, states))


def test_a_result_without_a_config_is_told(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    (folders[0] / "config.json").unlink()
    summary = merge_checkpoints(recipe("ties", folders, density=0.5), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    note = f"{folders[0]} has no config.json, so the result gets none"
    assert any(note in each for each in summary.notes)
    assert not any(
        "config.json" in note
        for note in merge_checkpoints(recipe("linear", folders[1:]), tmp_path / "other").notes
    )


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_bytes_do_not_depend_on_threads(tmp_path: Path, folders: list[Path]) -> None:
    found = []
    for threads in (1, 2, 3, 0):
        out = tmp_path / f"threads{threads}" / "out"
        merge_checkpoints(
            recipe("ties", folders, density=0.4), out, threads=threads, out_shard_size=3000
        )
        found.append(digests(out))
    assert len(found[0]) > 4
    assert all(each == found[0] for each in found)


def test_shards_and_index(tmp_path: Path, folders: list[Path]) -> None:
    out = tmp_path / "out"
    summary = merge_checkpoints(recipe("linear", folders), out, out_shard_size="2KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    state = read_result(out)
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in state.values()),
        "total_size": sum(t.nbytes for t in state.values()),
    }
    assert sorted(index["weight_map"]) == sorted(state)
    assert sorted(set(index["weight_map"].values())) == sorted(summary.files)
    manifest = json.loads((out / "pymerge_manifest.json").read_text())
    for file, entry in manifest["outputs"].items():
        assert entry["sha256"] == hashlib.sha256((out / file).read_bytes()).hexdigest()
        assert entry["bytes"] == (out / file).stat().st_size


# Whole-model scope (T7).


def scoped(folders: list[Path], options: TiesOptions) -> MergeRecipe:
    def tasks(headers: Any) -> list[TensorTask]:
        names = headers[0].tensors
        return [
            TensorTask(n, (Source(1, n), Source(2, n)), Source(0, n), options, "ties")
            for n in names
        ]

    return MergeRecipe(tuple(map(str, folders)), 0, "ties", tasks)


@pytest.mark.parametrize(
    "options",
    [
        {"flavor": "paper", "density": 0.3},
        {"flavor": "paper", "density": 0.3, "elect": "count"},
        {"flavor": "mergekit", "scope": "model", "density": [0.2, 0.7]},
        {"scope": "model", "trim": "outliers", "density": 0.5, "gamma": 0.1},
        {"scope": "model", "trim": "none", "zero_sign": "majority"},
        {
            "scope": "model",
            "trim": "random",
            "density": 0.5,
            "zero_sign": "majority",
            "rescale": "density",
        },
        {"scope": "model", "density": 0.5, "rescale": "l2"},
        {"scope": "model", "density": 0.0},
        {
            "scope": "model",
            "elect": "none",
            "merge": "sum",
            "density": 0.4,
            "zero_sign": "majority",
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("negative", [False, True])
def test_model_scope(
    tmp_path: Path, folders: list[Path], sizes: Sizes, options: dict[str, Any], negative: bool
) -> None:
    """With zero sums on purpose: half of the second model's task vector is the first's with the
    other sign.
    """
    states = family()
    for name in states[0]:
        base, one, two = (state[name] for state in states)
        if negative:
            one.copy_(base - (one - base).abs())
        flat = two.reshape(-1)
        half = flat.numel() // 2
        mirrored = base.reshape(-1).double() * 2 - one.reshape(-1).double()
        flat[:half] = mirrored[:half].to(flat.dtype)
    folders = [write_model(tmp_path / f"s{k}", state) for k, state in enumerate(states)]
    made = scoped(folders, resolve_options(2, **options))
    merge_in(sizes, made, tmp_path / "out")
    assert_same(read_result(tmp_path / "out"), expected(made, states))


@pytest.mark.parametrize("trim", ["magnitude", "outliers"])
def test_model_scope_maps_no_input_that_is_read(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch, trim: str
) -> None:
    """From Python, where nothing survives that a mapped file is truncated. One region holds all of
    them, since mappings are few, and is given back before the first tensor is merged.
    """
    held = []
    sizes = []

    def anonymous(nbytes: int) -> Region:
        held.append(made(nbytes))
        sizes.append(nbytes)
        return held[-1]

    made = Region.anonymous
    monkeypatch.setattr(InputFile, "region", property(lambda file: pytest.fail("it is mapped")))
    monkeypatch.setattr(Region, "anonymous", anonymous)
    monkeypatch.delenv("PYMERGE_IO", raising=False)
    options = resolve_options(2, scope="model", zero_sign="majority", density=0.5, trim=trim)

    def progress(*_: Any) -> None:
        assert not held[0].address

    recipe_made = scoped(folders, options)
    merge_checkpoints(recipe_made, tmp_path / "out", progress=progress)
    assert_same(read_result(tmp_path / "out"), expected(recipe_made, family()))
    stored = sum(tensor.nbytes for state in family() for tensor in state.values())
    assert stored * 0.9 < sizes[0] < stored + 64 * 3 * len(family()[0])


def test_model_scope_may_drop_all_but_the_smallest(tmp_path: Path, sizes: Sizes) -> None:
    """T3: then the upper threshold is the smallest magnitude, which is not 0 here."""
    states = [
        {name: (t.double() + k * (1 + t.double().sigmoid())).float() for name, t in state.items()}
        for k, state in enumerate(family(dtype=torch.float32))
    ]
    folders = [write_model(tmp_path / f"s{k}", state) for k, state in enumerate(states)]
    count = sum(t.numel() for t in states[0].values())
    made = scoped(
        folders,
        resolve_options(
            2, scope="model", trim="outliers", density=1.5 / count, gamma=[1.0, 0.5], elect="none"
        ),
    )
    merge_in(sizes, made, tmp_path / "out")
    result = read_result(tmp_path / "out")
    assert_same(result, expected(made, states))
    assert sum(int((result[n] != states[0][n]).sum()) for n in result) == 2


def test_model_scope_wants_one_set_of_parameters(tmp_path: Path, folders: list[Path]) -> None:
    some, other = (resolve_options(2, scope="model", density=d) for d in (0.2, 0.3))

    def tasks(headers: Any) -> list[TensorTask]:
        return [
            TensorTask(n, (Source(1, n), Source(2, n)), Source(0, n), o, "ties")
            for n, o in (("lm_head.weight", some), ("model.norm.weight", other))
        ]

    made = MergeRecipe(tuple(map(str, folders)), 0, "ties", tasks, sliced=True)
    assert any('scope "model"' in problem for problem in plan_checkpoints(made).problems)


# What is copied.


def test_integers_come_from_the_base(tmp_path: Path, sizes: Sizes) -> None:
    states = family()
    for k, state in enumerate(states):
        state["ids"] = torch.arange(300) + k
        state["mask"] = torch.tensor([True, False])
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    config = recipe("ties", folders, density=0.5)
    summary = merge_in(sizes, config, tmp_path / "out")
    result = read_result(tmp_path / "out")
    assert torch.equal(result["ids"], torch.arange(300))
    assert torch.equal(result["mask"], torch.tensor([True, False]))
    notes = [note for note in summary.notes if "ids" in note]
    assert len(notes) == 1
    assert "differs in" in notes[0] and str(folders[1]) in notes[0] and str(folders[2]) in notes[0]
    assert not any("mask" in note for note in summary.notes)


def test_float8_is_copied_where_it_agrees(tmp_path: Path, sizes: Sizes) -> None:
    states = family()
    for state in states:
        state["scale"] = torch.linspace(-1, 1, 500).to(torch.float8_e4m3fn)
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    config = recipe("linear", folders)
    merge_in(sizes, config, tmp_path / "out")
    bits = read_result(tmp_path / "out")["scale"].view(torch.uint8)
    assert torch.equal(bits, states[0]["scale"].view(torch.uint8))


def test_passthrough_is_bit_for_bit(tmp_path: Path, sizes: Sizes) -> None:
    (state,) = family(0)
    state["odd"] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-40]).repeat(200)
    folder = write_model(tmp_path / "m", state)
    config = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    merge_in(sizes, config, tmp_path / "out", allow_non_finite=True)
    assert_same(read_result(tmp_path / "out"), state, payloads=True)
    merge_in(sizes, config | {"dtype": "float64"}, tmp_path / "wide", allow_non_finite=True)
    wide = read_result(tmp_path / "wide")
    assert all(t.dtype == torch.float64 for t in wide.values())
    torch.testing.assert_close(wide["odd"], state["odd"].double(), rtol=0, atol=0, equal_nan=True)


def test_empty_tensors_and_scalars(tmp_path: Path, sizes: Sizes) -> None:
    states = family()
    for k, state in enumerate(states):
        state["scalar"] = torch.tensor(float(k)).bfloat16()
        state["none"] = torch.empty(0, 5, dtype=torch.bfloat16)
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    config = recipe("ties", folders, density=0.5)
    merge_in(sizes, config, tmp_path / "out")
    assert_same(read_result(tmp_path / "out"), expected(config, order(config, folders, states)))


def test_slices(tmp_path: Path) -> None:
    (state,) = family(0)
    config = CONFIG | {"layer_types": ["full", "sliding"]}
    folder = write_model(tmp_path / "m", state, config)
    pieces = [{"sources": [{"model": str(folder), "layer_range": r}]} for r in ([0, 2], [1, 2])]
    merge_checkpoints({"merge_method": "passthrough", "slices": pieces}, tmp_path / "out")
    result = read_result(tmp_path / "out")
    assert len(result) == len(state) + 3
    for name in (n for n in state if ".layers.1." in n):
        assert torch.equal(result[name.replace(".1.", ".2.")], state[name])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_hidden_layers"] == 3
    assert written["layer_types"] == ["full", "sliding", "sliding"]


# Tied output layers.


def tied(state: State) -> State:
    return {name: t for name, t in state.items() if name != "lm_head.weight"}


def test_tied_stays_tied(tmp_path: Path) -> None:
    """The base ties by its config; one model stores the copy, the other does not."""
    states = family()
    config = CONFIG | {"tie_word_embeddings": True}
    states[1]["lm_head.weight"] = states[1]["model.embed_tokens.weight"].clone()
    states = [tied(states[0]), states[1], tied(states[2])]
    folders = [write_model(tmp_path / f"m{k}", s, config) for k, s in enumerate(states)]
    merge_checkpoints(recipe("ties", folders, density=0.5), tmp_path / "out")
    assert "lm_head.weight" not in read_result(tmp_path / "out")


def test_base_with_a_stored_tied_head(tmp_path: Path) -> None:
    states = family()
    config = CONFIG | {"tie_word_embeddings": True}
    folders = [write_model(tmp_path / f"m{k}", s, config) for k, s in enumerate(states)]
    summary = merge_checkpoints(recipe("ties", folders, density=0.5), tmp_path / "out")
    assert "lm_head.weight" not in read_result(tmp_path / "out")
    assert any("ties it to the embedding" in note for note in summary.notes)


def test_tied_model_on_an_untied_base(tmp_path: Path) -> None:
    """The embedding stands for the head that a tied model does not store."""
    states = family()
    folders = [
        write_model(tmp_path / "base", states[0]),
        write_model(tmp_path / "m1", tied(states[1]), CONFIG | {"tie_word_embeddings": True}),
        write_model(tmp_path / "m2", states[2]),
    ]
    config = recipe("ties", folders, density=0.5)
    merge_checkpoints(config, tmp_path / "out")
    states[1]["lm_head.weight"] = states[1]["model.embed_tokens.weight"]
    assert_same(read_result(tmp_path / "out"), expected(config, order(config, folders, states)))


def test_untied_model_on_a_tied_base_is_a_mismatch(tmp_path: Path) -> None:
    states = family()
    folders = [
        write_model(tmp_path / "base", tied(states[0]), CONFIG | {"tie_word_embeddings": True}),
        write_model(tmp_path / "m1", states[1]),
        write_model(tmp_path / "m2", states[2]),
    ]
    problems = plan_checkpoints(recipe("ties", folders, density=0.5)).problems
    assert len(problems) == 2
    assert all("lm_head.weight" in problem for problem in problems)


def test_constants_of_other_library_versions(tmp_path: Path) -> None:
    states = family()
    states[0]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
    states[1]["model.rotary_emb.inv_freq"] = torch.arange(4.0)
    folders = [write_model(tmp_path / f"m{k}", s) for k, s in enumerate(states)]
    plan = plan_checkpoints(recipe("ties", folders, density=0.5))
    assert not plan.problems
    assert len([note for note in plan.notes if "inv_freq" in note]) == 2


@pytest.mark.parametrize("base", [torch.int64, torch.int32, torch.float16])
def test_constants_are_compared_by_value(tmp_path: Path, base: torch.dtype, sizes: Sizes) -> None:
    """Whatever kind of number a library stored them as; the base's are taken as they are."""
    states = family()
    ids = "text_model.embeddings.position_ids"
    for k, (state, dtype) in enumerate(
        zip(states, (base, torch.int64, torch.bfloat16), strict=True)
    ):
        state[ids] = torch.arange(40)[None].to(dtype)
        state["norm.num_batches_tracked"] = torch.tensor(
            5 + (k == 2), dtype=(torch.int64, torch.int32, torch.int16)[k]
        )
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    summary = merge_in(sizes, recipe("linear", [folders[0], *folders]), tmp_path / "out")
    result = read_result(tmp_path / "out")
    assert result[ids].dtype == base and torch.equal(result[ids], states[0][ids])
    assert torch.equal(result["norm.num_batches_tracked"], torch.tensor(5))
    (note,) = [note for note in summary.notes if "differs" in note]
    assert note.startswith(f"norm.num_batches_tracked differs in {folders[2]} (int64")


def test_metadata_of_a_single_file_is_kept(tmp_path: Path, folders: list[Path]) -> None:
    """Of the base, in every file of the result, but for hashes of tensors that are merged now."""
    kept = {"modelspec.architecture": "stable-diffusion-v1", "ss_steps": "1\n2", "format": "pt"}
    one = folders[0] / "model.safetensors"
    save_file(
        load_file(one), one, metadata={**kept, "sshs_model_hash": "1f", "x.hash_sha256": "2e"}
    )
    merge_checkpoints(recipe("ties", folders, density=0.5), tmp_path / "out", out_shard_size=1500)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == kept
    merge_checkpoints(recipe("linear", folders), tmp_path / "other")  # the first model has none
    with safe_open(tmp_path / "other" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


# What lies beside the weights.


def test_other_files(tmp_path: Path, folders: list[Path]) -> None:
    base, one = folders[0], folders[1]
    (base / "generation_config.json").write_text('{"a": 1}')
    vocabulary = '{"model": {"vocab": {"a": 0}}, "of": "%s"}'
    (base / "tokenizer.json").write_text(vocabulary % "base")
    (base / "notes.txt").write_text("notes")
    (one / "tokenizer.json").write_text(vocabulary % "one")
    (one / "vocab.txt").write_text("one")
    (one / "additional_chat_templates").mkdir()
    (one / "additional_chat_templates" / "tool.jinja").write_text("tool")
    config = recipe("ties", folders, density=0.5)
    merge_checkpoints(config, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "generation_config.json").read_text() == '{"a": 1}'
    assert (out / "tokenizer.json").read_text() == vocabulary % "base"
    assert (out / "notes.txt").exists() and not (out / "vocab.txt").exists()
    merge_checkpoints(config | {"tokenizer_source": str(one)}, tmp_path / "other")
    assert (tmp_path / "other" / "tokenizer.json").read_text() == vocabulary % "one"
    assert (tmp_path / "other" / "additional_chat_templates" / "tool.jinja").read_text() == "tool"
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "merge_method: ties" in card and "- mergekit" in card


def test_dtype_of_nested_configs(tmp_path: Path) -> None:
    config = {
        "dtype": "float32",
        "text_config": {"torch_dtype": "float32"},
        "quantization_config": {"dtype": "x"},
    }
    state = {**family(0)[0], "q.qweight": torch.zeros(2, 2, dtype=torch.int32)}
    folder = write_model(tmp_path / "m", state, config)
    merge_checkpoints(
        {"merge_method": "passthrough", "models": [{"model": str(folder)}], "out_dtype": "float16"},
        tmp_path / "out",
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {
        "dtype": "float16",
        "text_config": {"torch_dtype": "float16"},
        "quantization_config": {"dtype": "x"},
    }


# What is reported.


def test_progress_and_summary(tmp_path: Path, folders: list[Path], sizes: Sizes) -> None:
    seen: list[tuple[int, int, str]] = []
    config = recipe("ties", folders, density=0.25)
    plan = plan_checkpoints(config)
    summary = merge_in(sizes, config, tmp_path / "out", progress=lambda *a: seen.append(a))
    states = family()
    count = sum(t.numel() for t in states[0].values())
    assert plan.parameters == summary.parameters == count
    assert plan.bytes_read == summary.bytes_read == 3 * 2 * count
    assert plan.bytes_written == summary.bytes_written == 2 * count
    assert [name for _, _, name in seen] == [tensor.name for tensor in plan.tensors]
    assert seen[-1][0] == seen[-1][1] == 4 * 2 * count
    assert all(a[0] < b[0] for a, b in itertools.pairwise(seen))
    ties = summary.methods["ties"]
    assert (ties.tensors, ties.elements, ties.considered) == (len(states[0]), count, 2 * count)
    assert 0.25 <= ties.kept_fraction < 0.35
    assert 0 < ties.conflict_fraction < 0.2
    assert ties.non_finite == 0
    assert summary.seconds > 0 and summary.gb_per_s > 0
    assert json.loads(json.dumps(summary.to_dict()))["methods"]["ties"]["tensors"] == len(states[0])


def test_dry_run_writes_nothing(tmp_path: Path, folders: list[Path]) -> None:
    summary = merge_checkpoints(
        recipe("ties", folders, density=0.5), tmp_path / "out", dry_run=True
    )
    assert summary.parameters and not summary.bytes_written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m1", "m2"]


def test_many_models(tmp_path: Path) -> None:
    folders = write_family(tmp_path, count=20)
    config = recipe("ties", folders, density=0.3)
    merge_checkpoints(config, tmp_path / "out")
    wanted = expected(config, order(config, folders, family(20)))
    assert_same(read_result(tmp_path / "out"), wanted)


def test_headers_alone_make_the_plan(monkeypatch: pytest.MonkeyPatch, folders: list[Path]) -> None:
    def refuse(*_: Any) -> Iterator[None]:
        raise AssertionError("data was read")

    monkeypatch.setattr("pymerge.checkpoint.stored.Region.of_input", refuse)
    monkeypatch.setattr("pymerge.checkpoint.stored.InputFile.read_into", refuse)
    plan = plan_checkpoints(recipe("ties", folders, density=0.5))
    assert not plan.problems and plan.dtype == "bfloat16"


def test_header_is_what_recipes_see(folders: list[Path]) -> None:
    seen: list[ModelHeader] = []

    def tasks(headers: Any) -> list[TensorTask]:
        seen.extend(headers)
        return [
            TensorTask(n, (Source(0, n),), None, None, "passthrough") for n in headers[0].tensors
        ]

    plan_checkpoints(MergeRecipe((str(folders[0]),), None, "passthrough", tasks))
    assert seen[0].reference == str(folders[0])
    assert seen[0].config == CONFIG
