"""What a merge refuses: before any work, all at once, by name, and with nothing left under the
output's name.
"""

from __future__ import annotations

import errno
import json
import re
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
    read_result,
    recipe,
    write_family,
    write_model,
    write_sharded,
)

from pymerge.checkpoint.types import Source
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import (
    CheckpointError,
    ConfigError,
    DiskFullError,
    MergeError,
    MismatchError,
    NonFiniteError,
    OutputError,
)
from pymerge.messages.words import some_names
from pymerge.recipe.model import MergeRecipe, TensorTask
from pymerge.rules.ties import resolve_options


def write(root: Path, states: list[State]) -> list[Path]:
    return [write_model(root / f"m{k}", state) for k, state in enumerate(states)]


def refused(root: Path, config: Any, kind: type[MergeError], **options: Any) -> str:
    before = sorted(root.rglob("*"))
    with pytest.raises(kind) as caught:
        merge_checkpoints(config, root / "out", **options)
    assert sorted(root.rglob("*")) == before
    return str(caught.value)


def test_errors_are_value_errors() -> None:
    for kind in (ConfigError, CheckpointError, MismatchError, NonFiniteError, OutputError):
        assert issubclass(kind, MergeError) and issubclass(kind, ValueError)
    assert issubclass(DiskFullError, OutputError)
    error = MergeError(["one", "two"])
    assert error.problems == ("one", "two")
    assert str(error) == "2 problems:\n  - one\n  - two"
    assert str(MergeError("one")) == "one"


def test_missing_models_are_all_named(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    config = recipe(
        "ties", [folders[0], tmp_path / "gone", folders[1], tmp_path / "lost"], density=0.5
    )
    text = refused(tmp_path, config, CheckpointError)
    assert "gone" in text and "lost" in text


def test_truncated_model(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    path = folders[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in refused(tmp_path, recipe("ties", folders, density=0.5), CheckpointError)


def test_missing_shard(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    folders[1] = write_sharded(tmp_path / "s", family()[1])
    (folders[1] / "model-00003-of-00003.safetensors").unlink()
    text = refused(tmp_path, recipe("ties", folders, density=0.5), CheckpointError)
    assert "model-00003-of-00003.safetensors" in text


def test_names_and_shapes_are_all_listed(tmp_path: Path) -> None:
    states = family()
    del states[1]["model.norm.weight"]
    del states[1]["model.layers.1.input_layernorm.weight"]
    states[2]["surplus"] = torch.ones(1)
    states[2]["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 3)
    states[1]["model.layers.1.mlp.up_proj.weight"] = torch.ones(24)
    text = refused(tmp_path, recipe("ties", write(tmp_path, states), density=0.5), MismatchError)
    for part in (
        "lacks 2 tensors",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "has 1 tensor that",
        "surplus",
        "model.layers.0.mlp.up_proj.weight is [24, 16] in",
        "[3, 3] in",
        "model.layers.1.mlp.up_proj.weight is",
        "[24] in",
    ):
        assert part in text


def test_vocabulary_sizes(tmp_path: Path) -> None:
    states = family()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        states[2][name] = torch.ones(40, 16)
    folders = write(tmp_path, states)
    text = refused(tmp_path, recipe("ties", folders, density=0.5), MismatchError)
    assert "vocabulary sizes differ" in text
    assert "lm_head.weight, model.embed_tokens.weight are" in text
    assert f"[37, 16] in {folders[0]} and {folders[1]}, [40, 16] in {folders[2]}" in text
    assert "give tokenizer_source (base, union, or a model)" in text
    assert "shapes differ" not in text


def test_plan_lists_problems_without_raising(tmp_path: Path) -> None:
    states = family()
    del states[1]["model.layers.0.input_layernorm.weight"]
    plan = plan_checkpoints(recipe("ties", write(tmp_path, states), density=0.5))
    assert len(plan.problems) == 1
    assert plan.tensors == ()


def test_float_against_integer(tmp_path: Path) -> None:
    states = family()
    states[1]["model.norm.weight"] = torch.arange(16)
    text = refused(tmp_path, recipe("ties", write(tmp_path, states), density=0.5), MismatchError)
    assert "model.norm.weight is bfloat16 in" in text and "int64 in" in text


def test_what_is_wrong_with_many_tensors_alike_is_said_once(tmp_path: Path) -> None:
    states = family()
    states[1] = {name: t.to(torch.float8_e4m3fn) for name, t in states[1].items()}
    folders = write(tmp_path, states)
    plan = plan_checkpoints(recipe("ties", folders, density=0.5))
    (problem,) = plan.problems
    assert f" and {len(states[0]) - 4} others are bfloat16 in" in problem
    config = recipe("linear", [folders[0], folders[0], folders[2]])
    config["models"][1]["parameters"]["weight"] = [-0.5, -0.5]  # known of each tensor alone
    with pytest.raises(ConfigError) as caught:
        plan_checkpoints(config)
    (problem,) = caught.value.problems
    assert f" and {len(states[0]) - 4} others: the weights of linear sum to 0" in problem


def test_float8_that_differs(tmp_path: Path) -> None:
    states = family()
    for k, state in enumerate(states):
        state["q"] = torch.full((300,), float(k)).to(torch.float8_e4m3fn)
    text = refused(tmp_path, recipe("linear", write(tmp_path, states)), MismatchError)
    assert "tensor q is float8_e4m3fn and differs" in text and "bfloat16" in text


def test_quantized_models(tmp_path: Path) -> None:
    states = family()
    folders = []
    for k, state in enumerate(states):
        state["q.qweight"] = torch.full((8, 8), k, dtype=torch.int32)
        config = CONFIG | ({"quantization_config": {"quant_method": "gptq"}} if k == 1 else {})
        folders.append(write_model(tmp_path / f"m{k}", state, config))
    text = refused(tmp_path, recipe("ties", folders, density=0.5), MismatchError)
    assert all(f"model {folder} is quantized (q.qweight is int32)" in text for folder in folders)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_non_finite(tmp_path: Path, method: str, value: float) -> None:
    states = family()
    states[2]["model.layers.1.mlp.up_proj.weight"][3, 4:6] = value
    folders = write(tmp_path, states)
    config = recipe(method, folders, **({} if method == "linear" else {"density": 0.5}))
    text = refused(tmp_path, config, NonFiniteError)
    assert "model.layers.1.mlp.up_proj.weight" in text
    assert f"2 in {folders[2]}" in text and str(folders[1]) not in text
    assert "allow_non_finite" in text
    summary = merge_checkpoints(config, tmp_path / "out", allow_non_finite=True)
    assert summary.methods[method].non_finite == 2
    assert any("up_proj" in note for note in summary.notes)
    used = states[1:] if method == "linear" else states
    assert_same(read_result(tmp_path / "out"), expected(config, used))


def test_non_finite_base_is_named(tmp_path: Path) -> None:
    states = family()
    states[0]["lm_head.weight"][0, 0] = float("nan")
    folders = write(tmp_path, states)
    text = refused(tmp_path, recipe("ties", folders, density=0.5), NonFiniteError)
    assert f"1 in {folders[0]}" in text and str(folders[1]) not in text


def test_differences_that_overflow(tmp_path: Path) -> None:
    states = family(dtype=torch.float32)
    states[0]["model.norm.weight"][0] = 3e38
    states[1]["model.norm.weight"][0] = -3e38
    text = refused(tmp_path, recipe("ties", write(tmp_path, states), density=0.5), NonFiniteError)
    assert "overflow" in text


def test_every_damaged_tensor_is_counted(tmp_path: Path) -> None:
    states = family()
    for name in list(states[0])[2:]:
        states[2][name].view(-1)[:3] = float("nan")
    folders = write(tmp_path, states)
    text = refused(tmp_path, recipe("ties", folders, density=0.5), NonFiniteError)
    names = list(plan_names(recipe("ties", folders, density=0.5)))
    bad = [name for name in names if name in list(states[0])[2:]]
    assert f"tensor {bad[0]} holds NaN or infinite values: 3 in {folders[2]}" in text
    assert f"(and {len(bad) - 1} of the tensors after it: {some_names(bad[1:])})" in text


def plan_names(config: Any) -> list[str]:
    return [tensor.name for tensor in plan_checkpoints(config).tensors]


@pytest.mark.parametrize("method", ["linear", "ties", "passthrough"])
def test_a_dtype_that_is_too_narrow(tmp_path: Path, method: str) -> None:
    """The inputs are finite, the cast is not: docs/spec/ties.md lets it overflow, a merge of
    folders does not.
    """
    states = family()
    for state in states:
        state["model.norm.weight"][:3] = 1e5
    folders = write(tmp_path, states)
    config = recipe(method, folders, **({"density": 0.5} if method == "ties" else {}))
    if method == "passthrough":
        config = {"merge_method": method, "models": [{"model": str(folders[1])}]}
    config["dtype"] = "float16"
    text = refused(tmp_path, config, NonFiniteError)
    assert "tensor model.norm.weight: 3 values of the result overflow float16" in text
    assert "dtype: bfloat16" in text and "allow_non_finite=True" in text
    summary = merge_checkpoints(config, tmp_path / "out", allow_non_finite=True)
    counts = summary.methods[method]
    assert (counts.non_finite, counts.non_finite_out) == (0, 3)
    assert summary.notes == (
        "3 elements of the result are NaN or infinite, in 1 tensor: model.norm.weight",
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_overflow_of_many_tensors_is_counted(tmp_path: Path, sharded: bool) -> None:
    states = family()
    for state in states:
        for tensor in state.values():
            tensor.view(-1)[0] = 1e5
    config = {**recipe("linear", write(tmp_path, states)), "dtype": "float16"}
    total = len(plan_names(config))
    options = {"out_shard_size": 1500} if sharded else {}
    with pytest.raises(NonFiniteError) as caught:
        merge_checkpoints(config, tmp_path / "out", **options)
    text = str(caught.value)
    if not sharded:
        assert f"and {total - 4} others: {total} values of the result overflow float16" in text
        assert "later files" not in text
    else:
        made = int(re.search(r"(\d+) values? of the result", text)[1])
        assert (
            0 < made < total and f"(later files, with {total - made} more, were not made)" in text
        )


def test_a_sum_that_overflows(tmp_path: Path) -> None:
    states = family(dtype=torch.float32)
    for state in states:
        state["model.norm.weight"][0] = 3e38
    config = recipe("linear", write(tmp_path, states), normalize=False)
    for model in config["models"]:
        model["parameters"]["weight"] = 1.0
    text = refused(tmp_path, config, NonFiniteError)
    assert "1 value of the result overflows float32" in text and "smaller weights" in text


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("pickled", [False, True])
def test_copies_that_are_not_finite(tmp_path: Path, dtype: str | None, pickled: bool) -> None:
    states = family()
    states[1]["model.norm.weight"][:2] = float("nan")
    states[1]["lm_head.weight"][:1] = float("inf")
    folder = write(tmp_path, states)[1]
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(states[1], folder / "pytorch_model.bin")
    config: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    if dtype:
        config["dtype"] = dtype
    text = refused(tmp_path, config, NonFiniteError)
    count = 2 if pickled else 16  # the order is that of the file
    assert f"holds NaN or infinite values: {count} in {folder} (and 1 of the tensors" in text
    summary = merge_checkpoints(config, tmp_path / "out", allow_non_finite=True)
    assert summary.methods["passthrough"].non_finite_out == 18
    assert any("in 2 tensors" in note for note in summary.notes)
    wanted = {n: t.float() if dtype else t for n, t in states[1].items()}
    assert_same(read_result(tmp_path / "out"), wanted)


def test_output_is_an_input(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    config = recipe("ties", folders, density=0.5)
    for out in folders:
        with pytest.raises(OutputError, match="input"):
            merge_checkpoints(config, out, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(folders[1])
    with pytest.raises(OutputError, match="input"):
        merge_checkpoints(config, link, overwrite=True)
    assert_same(read_result(folders[1]), family()[1])


def test_output_in_use(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    config = recipe("ties", folders, density=0.5)
    merge_checkpoints(config, tmp_path / "out")
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(OutputError, match="not empty"):
        merge_checkpoints(config, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
    merge_checkpoints(recipe("linear", folders), tmp_path / "out", overwrite=True)
    manifest = json.loads((tmp_path / "out" / "pymerge_manifest.json").read_text())
    assert "linear" in manifest["methods"]


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file, which is not a folder; write elsewhere"):
        merge_checkpoints(recipe("linear", folders), tmp_path / "file" / "out")
    for place, why in (("/dev/full/out", "not a folder"), ("/proc/out", "cannot be written")):
        with pytest.raises(OutputError, match=why) as caught:
            merge_checkpoints(recipe("linear", folders), place)
        assert not isinstance(caught.value, DiskFullError)


def test_disk_full_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write_family(tmp_path)

    class Full:
        f_blocks, f_bavail, f_frsize = 100, 10, 4096

    monkeypatch.setattr("os.statvfs", lambda _: Full)
    text = refused(tmp_path, recipe("linear", folders), DiskFullError)
    assert "GB free" in text


def test_disk_full_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write_family(tmp_path)
    calls = []

    def fill(fd: int, view: memoryview, position: int) -> None:
        calls.append(position)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pymerge.checkpoint.writer._write", fill)
    text = refused(tmp_path, recipe("linear", folders), DiskFullError, out_shard_size=1000)
    assert "free some space" in text


@pytest.mark.parametrize("size", ["five", "0", -3])
def test_shard_size(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ValueError, match="out_shard_size"):
        merge_checkpoints(
            recipe("linear", write_family(tmp_path)), tmp_path / "out", out_shard_size=size
        )


def test_device(tmp_path: Path) -> None:
    config = recipe("linear", write_family(tmp_path))
    assert "device='tpu'" in refused(tmp_path, config, ConfigError, device="tpu")


def test_kernels_are_there_and_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe("linear", write_family(tmp_path))
    monkeypatch.setenv("PYMERGE_CPU_LEVEL", "mmx")
    with pytest.raises(ValueError, match="mmx"):
        merge_checkpoints(config, tmp_path / "out")
    monkeypatch.delenv("PYMERGE_CPU_LEVEL")
    monkeypatch.setattr("pymerge.backends.native.why_not", lambda: "not built; build it")
    with pytest.raises(RuntimeError, match="not built"):
        merge_checkpoints(config, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m1", "m2"]


@pytest.mark.parametrize("threads", [-1, 2.5, "two", True])
def test_threads(tmp_path: Path, threads: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="threads"):
        merge_checkpoints(
            recipe("linear", write_family(tmp_path)), tmp_path / "out", threads=threads
        )


def custom(folders: list[Path], tasks: Any, **options: Any) -> MergeRecipe:
    return MergeRecipe(tuple(map(str, folders)), 0, "ties", lambda _: tasks, **options)


def test_recipes_that_make_no_sense(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    name = "lm_head.weight"
    options = resolve_options(2, density=0.5)
    two = TensorTask(name, (Source(1, name), Source(2, name)), Source(0, name), options, "ties")
    one = TensorTask(name, (Source(1, name),), Source(0, name), options, "ties")
    for tasks, more, word in (
        ([two, two], {}, "makes more than once: lm_head.weight"),
        ([one], {}, "1 model but options for 2"),
        ([], {}, "makes no tensors"),
        ([two], {"dtype": "int8"}, "dtype='int8'"),
        ([two], {"out_dtype": "bf16"}, "out_dtype='bf16'"),
    ):
        text = refused(tmp_path, custom(folders, tasks, sliced=True, **more), MismatchError)
        assert word in text


def test_single_tensor_file_as_output_name(tmp_path: Path) -> None:
    """An output is a folder whatever its name."""
    folders = write_family(tmp_path)
    merge_checkpoints(recipe("linear", folders), tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors" / "config.json").exists()
    assert CONFIG["model_type"] == "llama"


def averaged(*folders: Path) -> dict[str, Any]:
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders]
    return {"merge_method": "linear", "models": models}


def test_a_bias_whose_name_ends_like_a_constant(tmp_path: Path) -> None:
    """GPT-2 stores the constant `attn.bias` and trains `attn.c_attn.bias`."""
    whole = {f"h.0.attn.{name}": torch.ones(4) for name in ("bias", "c_attn.bias", "c_attn.weight")}
    lacking = {name: x for name, x in whole.items() if name != "h.0.attn.c_attn.bias"}
    constant = {name: x for name, x in whole.items() if name != "h.0.attn.bias"}
    for k, state in enumerate((whole, lacking, constant)):
        write_model(tmp_path / str(k), state)
    with pytest.raises(MismatchError, match=r"c_attn\.bias"):
        merge_checkpoints(averaged(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    merge_checkpoints(averaged(tmp_path / "0", tmp_path / "2"), tmp_path / "out")
