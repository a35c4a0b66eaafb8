"""Every form that a model may have on disk gives the same tensors."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import CONFIG, State, assert_same, family, write_model, write_sharded
from safetensors.torch import load_file, save_file

from pymerge.backends import native
from pymerge.checkpoint.inputs import open_models
from pymerge.checkpoint.memory import Region, prefers_reads
from pymerge.checkpoint.reader import OpenModel, open_model
from pymerge.errors import CheckpointError


def contents(model: OpenModel) -> State:
    result = {}
    for name, stored in model.tensors.items():
        held = bytearray(stored.nbytes)
        stored.read_into(0, memoryview(held))
        dtype = getattr(torch, stored.info.dtype)
        flat = torch.frombuffer(held, dtype=dtype) if held else torch.empty(0, dtype=dtype)
        result[name] = flat.reshape(stored.info.shape)
    return result


def mapped(model: OpenModel, name: str) -> bytes:
    import ctypes

    stored = model.tensors[name]
    return ctypes.string_at(stored.address(), stored.nbytes)


def write_bin(folder: Path, state: State) -> Path:
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_sharded_bin(folder: Path, state: State) -> Path:
    folder.mkdir()
    weight_map = {}
    for number, name in enumerate(state):
        file = f"pytorch_model-{number % 2 + 1:05}-of-00002.bin"
        weight_map[name] = file
    for file in set(weight_map.values()):
        torch.save({n: t for n, t in state.items() if weight_map[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_file(path: Path, state: State) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def write_legacy(path: Path, state: State) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def write_nested(path: Path, state: State) -> Path:
    torch.save({"state_dict": state, "epoch": 3}, path)
    return path


def write_odd_name(folder: Path, state: State) -> Path:
    folder.mkdir()
    save_file(state, folder / "weights.safetensors")
    return folder


FORMS: dict[str, Any] = {
    "folder": write_model,
    "sharded": write_sharded,
    "bin": write_bin,
    "sharded bin": write_sharded_bin,
    "one safetensors file of any name": write_odd_name,
    "file.safetensors": lambda p, s: write_file(p.with_suffix(".safetensors"), s),
    "file.pt": lambda p, s: write_file(p.with_suffix(".pt"), s),
    "file.pth": lambda p, s: write_file(p.with_suffix(".pth"), s),
    "file.bin": lambda p, s: write_file(p.with_suffix(".bin"), s),
    "old PyTorch file": lambda p, s: write_legacy(p.with_suffix(".pt"), s),
    "under state_dict": lambda p, s: write_nested(p.with_suffix(".pt"), s),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: Path, form: str) -> None:
    state = family(0)[0] | {
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "ids": torch.arange(9),
    }
    model = open_model(str(FORMS[form](tmp_path / "model", state)))
    assert sorted(model.tensors) == sorted(state)
    for name, tensor in contents(model).items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
        if model.tensors[name].in_place:
            bits = state[name].reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
            assert mapped(model, name) == bytes(bits.tolist())
    model.close()


def test_strided_and_shared_tensors_of_a_pickle(tmp_path: Path) -> None:
    whole = torch.randn(6, 8)
    path = tmp_path / "m.pt"
    torch.save({"transposed": whole.t(), "rows": whole[::2], "whole": whole}, path)
    model = open_model(str(path))
    assert not model.tensors["transposed"].in_place
    for name, tensor in {"transposed": whole.t(), "rows": whole[::2], "whole": whole}.items():
        assert torch.equal(contents(model)[name], tensor)


def test_single_file_wins_over_index(tmp_path: Path) -> None:
    state = family(0)[0]
    folder = write_sharded(tmp_path / "m", state)
    save_file({"only": torch.ones(1)}, folder / "model.safetensors")
    assert list(open_model(str(folder)).tensors) == ["only"]


def test_tensors_outside_of_the_index(tmp_path: Path) -> None:
    """A listed shard is read as a whole; where the index has a name elsewhere, it decides."""
    state = family(0)[0]
    folder = write_sharded(tmp_path / "m", state)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = folder / index["weight_map"].pop("lm_head.weight")
    path.write_text(json.dumps(index))
    model = open_model(str(folder))
    assert_same(contents(model), state)
    assert f"{shard}: tensor 'lm_head.weight' is not in the index; it is read" in model.notes[0]
    other = next(file for file in index["weight_map"].values() if file != shard.name)
    held = load_file(folder / other)
    name = next(name for name, file in index["weight_map"].items() if file == shard.name)
    save_file({**held, name: state[name] + 1}, folder / other)
    model = open_model(str(folder))
    assert_same(contents(model), state)
    assert f"tensor '{name}' is left out, since the index has it in another file" in str(
        model.notes
    )
    save_file({**held, "lm_head.weight": state["lm_head.weight"]}, folder / other)
    with pytest.raises(CheckpointError, match=r"the index lists neither: 'lm_head\.weight'"):
        open_model(str(folder))


def test_io_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, reads in (("mmap", False), ("read", True)):
        monkeypatch.setenv("PYMERGE_IO", value)
        assert prefers_reads(tmp_path / "x") is reads
    monkeypatch.setenv("PYMERGE_IO", "fast")
    with pytest.raises(ValueError, match=r"PYMERGE_IO='fast'.*mmap"):
        prefers_reads(tmp_path / "x")


def test_io_by_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYMERGE_IO", raising=False)
    for kind, reads in (("ext4", False), ("nfs4", True), ("fuse.sshfs", True), ("", False)):
        monkeypatch.setattr("pymerge.checkpoint.memory._file_system", lambda _, k=kind: k)
        with native.surviving_lost_pages():
            assert prefers_reads(tmp_path / "x") is reads
        assert prefers_reads(tmp_path / "x")  # nothing to survive with


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_file_system_of_proc() -> None:
    from pymerge.checkpoint.memory import _file_system

    assert _file_system(Path("/proc")) == "proc"


def test_region_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 64)
    fd = os.open(path, os.O_RDWR)
    region = Region.of_file(fd, 5001)
    os.close(fd)
    assert bytes(region.view()) == path.read_bytes()[:5001]
    region.view()[-2:] = b"ab"
    region.populate(0, 5001, write=True)
    region.close()
    assert path.read_bytes()[4999:5001] == b"ab"


def test_no_file_descriptor_is_held(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    folders = [write_model(tmp_path / f"m{k}", {"a": torch.ones(2)}) for k in range(20)]
    models = open_models(map(str, folders))
    for model in models:
        assert model.tensors["a"].address()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    for model in models:
        model.close()


# What is wrong with a model.


def test_everything_missing_is_listed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as caught:
        open_models([str(tmp_path / "absent"), str(tmp_path / "empty"), "./nope.safetensors"])
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    for word in ("absent", "does not exist", "holds no model", "nope.safetensors"):
        assert word in text


@pytest.mark.parametrize(
    "reference", ["", "a" * 5000, "a\0b", "~nobody-there/x", "x/y/z", "-x", "/", "https://x.y/z"]
)
def test_odd_references(reference: str) -> None:
    with pytest.raises(CheckpointError):
        open_model(reference)


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    """transformers reads the shards that an index names, whatever it says is in which."""
    state = family(0)[0]
    folder = write_sharded(tmp_path / "m", state)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = {files[0]: files[1], files[1]: files[0]}
    index["weight_map"] = {name: moved.get(f, f) for name, f in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    model = open_model(str(folder))
    assert_same(contents(model), state)
    first, second = sorted(model.notes)
    assert first.startswith(f"{folder / files[0]}: holds '")
    assert f"which the index has in {files[1]}; read from where it is" in first
    assert second.startswith(f"{folder / files[1]}: holds '")


def test_index_names_what_is_not_there(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "m", family(0)[0])
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors'.*missing"):
        open_model(str(folder))
    folder = write_sharded(tmp_path / "n", family(0)[0])
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {
        "ghost": "model-00001-of-00003.safetensors",
        "spirit": "model-00001-of-00003.safetensors",
    }
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks tensors.*'ghost', 'spirit'"):
        open_model(str(folder))


@pytest.mark.parametrize(
    "shard",
    [
        "../other.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        "..",
        "a\\..\\b",
        "C:x",
        "a\0b",
        "",
    ],
)
def test_index_that_leaves_its_folder(tmp_path: Path, shard: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_model(str(folder))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'],
)
def test_garbage_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: .*download it again"):
        open_model(str(tmp_path))


def test_links_are_followed(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    save_file({"a": torch.ones(3)}, blobs / "abc")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(blobs / "abc")
    assert list(open_model(str(folder)).tensors) == ["a"]


def test_shards_without_index(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "m", family(0)[0])
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"3 safetensors files.*index"):
        open_model(str(folder))


def test_adapter_is_not_a_model(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter, not a model; .* base\+adapter"):
        open_model(str(tmp_path))


def test_bad_config(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"a": torch.ones(1)})
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            open_model(str(folder))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /nonexistent/evil",))


@pytest.mark.parametrize(
    "content", [Evil(), {"a": Evil()}, 5, {}, [torch.ones(1)], {"a": torch.ones(2).to_sparse()}]
)
def test_pickles_that_are_no_models(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "m.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"m\.pt"):
        open_model(str(path))


def test_garbage_pickle(tmp_path: Path) -> None:
    # The last two announce texts and bytes of many exabytes, which no machine can make room for.
    lengths = [
        (code + (1 << 62).to_bytes(8, "little")).ljust(300, b"x") for code in (b"\x8d", b"\x8e")
    ]
    for number, content in enumerate((b"", b"garbage", b"PK\x03\x04", os.urandom(300), *lengths)):
        path = tmp_path / f"m{number}.bin"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged.*safetensors") as caught:
            open_model(str(path))
        assert "weights_only" not in str(caught.value)


def test_a_damaged_zip_with_names_that_are_no_text(tmp_path: Path) -> None:
    """torch repeats the names in its error, which Python then cannot read."""
    path = tmp_path / "saved.bin"
    torch.save({"a": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes().replace(b"saved/data.pkl", b"s\xe9vedXdata.pkl"))
    with pytest.raises(UnicodeDecodeError):
        torch._C.PyTorchFileReader(str(path))
    with pytest.raises(CheckpointError, match=r"damaged.*safetensors"):
        open_model(str(path))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "name"),
    [(Evil(), f"{os.system.__module__}.system"), (argparse.Namespace(a=1), "argparse.Namespace")],
)
def test_code_in_a_pickle_is_named(tmp_path: Path, content: Any, name: str, zipped: bool) -> None:
    path = tmp_path / "m.bin"
    state = {"a": torch.ones(2), "b": content}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        open_model(str(path))
    text = str(caught.value)
    assert f"unpickling it would call {name}, and no code" in text
    assert "safetensors.torch.save_file" in text and "weights_only" not in text


@pytest.mark.filterwarnings("error", "ignore:Detected pickle protocol 3")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", range(6))
def test_other_protocols_are_read_or_named(tmp_path: Path, protocol: int, zipped: bool) -> None:
    path = tmp_path / "m.bin"
    state = {"a.weight": torch.ones(2, 3)}
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    if protocol in (2, 3):
        assert open_model(str(path)).header.tensors.keys() == state.keys()
        return
    named = "0 or 1" if protocol < 2 else str(protocol)
    with pytest.raises(CheckpointError, match=f"protocol {named}, which.*save_file"):
        open_model(str(path))


def test_the_first_format_of_torch_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with tarfile.open(path, "w") as records:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            records.addfile(tarfile.TarInfo(name))
    with pytest.raises(CheckpointError, match=r"is in the tar format.*save_file") as caught:
        open_model(str(path))
    assert "weights_only" not in str(caught.value)


def test_not_every_one_of_many_missing_models_is_asked_for() -> None:
    with pytest.raises(CheckpointError) as caught:
        open_models(f"./missing-{n}" for n in range(3000))
    assert len(caught.value.problems) == 33
    assert caught.value.problems[-1] == "2,968 further models were not looked at"


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="neither a model folder nor"):
        open_model(str(path))


def test_what_is_wrong_with_weights_tokenizers_and_statistics_is_told_at_once(
    tmp_path: Path,
) -> None:
    folders = [write_model(tmp_path / name, {"a": torch.ones(2)}) for name in "xyz"]
    (folders[0] / "model.safetensors").write_bytes(b"1")
    (folders[1] / "tokenizer.json").mkdir()
    (tmp_path / "s").write_bytes(b"12")
    paths = [str(tmp_path / "s"), None, str(tmp_path / "s")]
    with pytest.raises(CheckpointError) as caught:
        open_models(map(str, folders), paths)
    first, second, third = caught.value.problems
    assert f"{folders[0]}/model.safetensors: is 1 bytes" in first
    assert f"{tmp_path}/s: is 2 bytes" in second  # once, though two models have it
    assert f"{folders[1]}/tokenizer.json" in third


def hub_cache(root: Path, name: str, state: State) -> str:
    """A cached repository as huggingface_hub lays it out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = root / f"models--{name.replace('/', '--')}"
    write_model(repo / "snapshots" / commit, state)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return commit


def test_hub_id_from_the_cache_offline(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    import subprocess

    hub_cache(tmp_path, "some/model", {"a": torch.ones(2)})
    code = (
        "import sys\n"
        "from pymerge.checkpoint.reader import open_model\n"
        "assert list(open_model('some/model').tensors) == ['a']\n"
        "assert list(open_model('some/model@main').tensors) == ['a']\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n"
        "    open_model('some/absent')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'some/absent' is neither a folder here nor to be had from the hub" in done.stdout
    assert "HF_HUB_OFFLINE is set, and it is not in the hub's cache" in done.stdout


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("LocalEntryNotFoundError", "the hub cannot be reached from here"),
        ("GatedRepoError", r"access to it is granted on its page.*hf auth login"),
        ("RepositoryNotFoundError", "there is none of that name that may be read"),
        ("RevisionNotFoundError", "it has no such revision"),
        ("ValueError", r"Got: something; check the name$"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    known: Any = getattr(errors, kind, ValueError)
    error = known.__new__(known)
    error.args = ("Got: something.\n\nand more lines",)

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model("some/absent@v1")
    assert "\n" not in str(caught.value)


def test_one_shard_of_several_is_no_model(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-00002-of-00005.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 1 safetensors file \(model-00002.*index"):
        open_model(str(tmp_path))


def test_a_safetensors_file_beside_a_pytorch_model_is_not_the_model(tmp_path: Path) -> None:
    save_file({"exp_avg": torch.ones(1)}, tmp_path / "optimizer.safetensors")
    torch.save({"real.weight": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert list(open_model(str(tmp_path)).tensors) == ["real.weight"]


SIX = torch.arange(6.0)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (
            {"state_dict": {"a": SIX}, "head.weight": SIX},
            r"beside its 'state_dict' \('head.weight'\)",
        ),
        ({"model": {"a": SIX}, "b": SIX}, r"beside its 'model' \('b'\)"),
        ({"state_dict": {"model": {"a": SIX}, "q": SIX}}, r"beside its 'model' \('q'\)"),
        ({"enc": {"w": SIX}, "x": SIX}, r"by names of text \('enc'\)"),
        ({"x": SIX, "l": [SIX]}, r"by names of text \('l'\)"),
        ({"x": SIX, 7: SIX}, r"by names of text \(7\)"),
    ],
)
def test_tensors_that_a_pytorch_file_holds_elsewhere(
    tmp_path: Path, content: Any, named: str
) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=named):
        open_model(str(tmp_path))


def test_numbers_beside_a_state_dict_are_no_tensors_of_the_model(tmp_path: Path) -> None:
    content = {"model": {"a": SIX, "steps": 3}, "loss": torch.tensor(0.5), "optimizer": {0: SIX}}
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert list(open_model(str(tmp_path)).tensors) == ["a"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model-q4_k.gguf", "llama.cpp; name the model that it was converted from"),
        ("tf_model.h5", "TensorFlow or Flax"),
        ("flax_model.msgpack", "TensorFlow or Flax"),
        ("model.onnx", "exported from"),
        ("global_step10", "python zero_to_fp32.py"),
        ("__0_0.distcp", "name its folder, in which .metadata lies"),
        ("pytorch_model_fsdp_0", "lacks its .metadata"),
        ("consolidated.00.pth", "convert them for transformers"),
    ],
)
def test_other_formats_say_the_way_out(tmp_path: Path, name: str, said: str) -> None:
    """What is often named in the place of a model: files of other programs, and of trainings."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"x" * 40)
    with pytest.raises(CheckpointError) as error:
        open_model(str(tmp_path))
    assert f"holds no model that can be read here, but {name}, which is" in str(error.value)
    assert said in str(error.value)


def test_a_single_file_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"\.ckpt file, which is a file of llama\.cpp; name"):
        open_model(str(tmp_path / "m.gguf"))


def test_the_folder_of_a_training_names_its_checkpoints(tmp_path: Path) -> None:
    for step in (500, 1000):
        write_model(tmp_path / f"checkpoint-{step}", family(0)[0])
    with pytest.raises(CheckpointError, match=r"name one of these, such as .*checkpoint-1000'"):
        open_model(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_is_not_the_file(tmp_path: Path, name: str) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{name}: is a pointer of Git LFS.*git lfs pull"):
        open_model(str(tmp_path))
