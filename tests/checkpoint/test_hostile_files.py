"""Pipes, devices, folders and links where files belong, links out of a folder, and files with
several names.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from folder_cases import CONFIG, family, write_model, write_sharded
from safetensors.torch import save_file
from solve_cases import recipe as solve_recipe
from solve_cases import write_statistics

from pymerge.checkpoint import files
from pymerge.checkpoint.files import parse_object, read_json
from pymerge.checkpoint.header import read_header
from pymerge.checkpoint.links import leads_out
from pymerge.checkpoint.pickles import check_pickled
from pymerge.checkpoint.reader import open_model
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import CheckpointError, MergeError
from pymerge.statistics import load, merge_files
from pymerge.statistics._models import load_model
from pymerge.statistics._text import read_examples
from pymerge.sweeps.results import read_progress


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """What waits for a pipe is ended, with an exception."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def bound_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket has a hundred bytes at most
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.symlink_to("gone")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


THINGS = [pipe, link_to_pipe, bound_socket, device, folder, link_to_nothing, link_to_itself]
FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "model.safetensors",
    "model.safetensors.index.json",
)


def linear(folders: list[Path]) -> dict[str, object]:
    models = [{"model": str(each), "parameters": {"weight": 0.5}} for each in folders]
    return {"merge_method": "linear", "models": models}


def write_tokenizer(folder: Path) -> None:
    vocab = {f"t{i}": i for i in range(37)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))


def put(thing: Callable[[Path], None], path: Path) -> None:
    path.unlink(missing_ok=True)
    thing(path)


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", FILES)
def test_a_model_folder(tmp_path: Path, name: str, thing: Callable[[Path], None]) -> None:
    states = family(1)
    made = [write_model(tmp_path / str(k), state) for k, state in enumerate(states)]
    if "index" in name:
        made[1] = write_sharded(tmp_path / "s", states[1])
    for each in made:
        write_tokenizer(each)
    put(thing, made[1] / name)
    with pytest.raises(CheckpointError, match=rf"{name}: (is|cannot be opened)"):
        plan_checkpoints(linear(made))


@pytest.mark.parametrize("thing", THINGS)
def test_a_shard(tmp_path: Path, thing: Callable[[Path], None]) -> None:
    made = write_sharded(tmp_path / "s", family(1)[0])
    put(thing, made / "model-00002-of-00003.safetensors")
    with pytest.raises(
        CheckpointError, match=r"names the shard 'model-00002-of-00003.safetensors', which"
    ):
        open_model(str(made))


def test_many_missing_shards_are_one_problem(tmp_path: Path) -> None:
    weights = {f"t{i}": f"model-{i:05}-of-00066.safetensors" for i in range(1, 41)}
    index = {"weight_map": {**weights, "a": "../a", "b": "../b"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        open_model(str(tmp_path))
    outside, missing = caught.value.problems
    assert "the shards '../a', '../b', each of which is outside its folder" in outside
    assert "'model-00004-of-00066.safetensors' and 36 others, each of which is missing" in missing


@pytest.mark.parametrize("thing", THINGS)
def test_what_is_named_by_itself(tmp_path: Path, thing: Callable[[Path], None]) -> None:
    states = family(1)
    model = write_model(tmp_path / "m", states[1])
    for name in ("m.safetensors", "m.bin", "s.stats", "r.yml", "x.txt", "x.jsonl"):
        put(thing, tmp_path / name)
        (tmp_path / "elsewhere").unlink(missing_ok=True) if thing is not link_to_pipe else None
        path = tmp_path / name
        calls: dict[str, Callable[[], object]] = {
            "m.safetensors": lambda path=path: open_model(str(path)),
            "m.bin": lambda path=path: open_model(str(path)),
            "s.stats": lambda path=path: load(path),
            "r.yml": lambda path=path: plan_checkpoints(path),
            "x.txt": lambda path=path: read_examples(path),
            "x.jsonl": lambda path=path: read_examples(path),
        }
        with pytest.raises((ValueError, OSError)) as caught:
            calls[name]()
        assert name.rpartition(".")[0] in str(caught.value)
        if name == "s.stats":
            with pytest.raises((ValueError, OSError)):
                plan_checkpoints(solve_recipe("mats", [model, model], [path, path]))
        if thing is link_to_pipe:
            (tmp_path / "elsewhere").unlink()


@pytest.mark.parametrize("thing", [pipe, device])
def test_manifest(tmp_path: Path, thing: Callable[[Path], None]) -> None:
    made = [write_model(tmp_path / str(k), state) for k, state in enumerate(family(1))]
    partial = tmp_path / ".out.pymerge-partial"
    partial.mkdir()
    thing(partial / "pymerge_manifest.json")
    with pytest.raises(MergeError, match=r"holds what no merge writes \(pymerge_manifest.json\)"):
        merge_checkpoints(linear(made), tmp_path / "out", resume=True)
    assert list(partial.glob("*.json"))


def test_statistics_of_a_folder_with_a_pipe(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    made = write_model(tmp_path / "m", family(1)[0])
    put(pipe, made / "config.json")
    with pytest.raises(CheckpointError, match=r"config.json: is a named pipe"):
        load_model(str(made), None, "cpu", "auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers 1000000000, and the files hold 9 tensors",
        ),
        ({"text_config": {"n_layer": 1e400}}, "n_layer inf, and the files hold 9 tensors"),
        ({"architectures": 5}, "architectures in its config is 5"),
        ({"architectures": [[]]}, r"architectures in its config is \[\[\]\]"),
        ({"num_hidden_layers": "x"}, "num_hidden_layers"),
    ],
)
def test_statistics_of_a_damaged_config(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    """transformers would make a thousand million layers before it looked at the files."""
    pytest.importorskip("transformers")
    made = write_model(tmp_path / "m", family(1)[0], {**CONFIG, **change})
    with pytest.raises(ValueError, match=message):
        load_model(str(made), None, "cpu", "auto")


def test_a_text_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="line 1 has more than"):
        read_examples(path)


def test_a_file_that_tells_no_size(tmp_path: Path) -> None:
    """/proc gives 0, and as much as is read."""
    (tmp_path / "x.json").symlink_to("/proc/self/cmdline")
    with pytest.raises(CheckpointError, match="is not readable JSON"):
        parse_object((tmp_path / "x.json").read_bytes(), tmp_path / "x.json")
    (tmp_path / "m.safetensors").symlink_to("/proc/self/cmdline")
    with pytest.raises(CheckpointError, match=r"0 bytes long|announces a header"):
        read_header(tmp_path / "m.safetensors")


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": lambda path: read_json(path),
    "model.safetensors": read_header,
    "x.bin": check_pickled,
    "x.txt": read_examples,
    "x.yml": lambda path: plan_checkpoints(path),
    "sweep.json": lambda path: read_progress(path, ""),
}


@pytest.mark.parametrize("name", READERS)
def test_what_claims_to_be_a_regular_file_and_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As /proc/kmsg does, which only root may open."""
    path = tmp_path / name
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)  # that writes nothing
    monkeypatch.setattr(files, "stat", SimpleNamespace(S_ISREG=lambda mode: True))
    with pytest.raises(ValueError, match="is not a regular file, but waits like a pipe"):
        READERS[name](path)
    os.close(writer)


# Links


def with_secret(tmp_path: Path) -> list[Path]:
    made = [write_model(tmp_path / str(k), state) for k, state in enumerate(family(1))]
    (tmp_path / "secret").write_text('{"password": "x"}')
    return made


OUTSIDE = {
    "tokenizer_config.json": "../secret",
    "generation_config.json": "chain",
    "modeling.py": "/etc/hostname",
    "additional_chat_templates": "../templates",
    "config.json": "../secret",
}


def test_links_out_of_the_folder_are_not_copied(tmp_path: Path) -> None:
    made = with_secret(tmp_path)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "a.jinja").write_text("secret")
    (made[0] / "chain").symlink_to("../secret")
    (made[0] / "vocab.txt").write_text("\n".join(f"t{i}" for i in range(37)))
    (made[0] / "tokenizer.model").mkdir()
    for name, target in OUTSIDE.items():
        (made[0] / name).unlink(missing_ok=True)
        (made[0] / name).symlink_to(target)
    (made[0] / "tokenizer.model").rmdir()
    summary = merge_checkpoints(linear(made), tmp_path / "out")
    out = tmp_path / "out"
    assert not any((out / name).exists() for name in OUTSIDE)
    assert (out / "vocab.txt").exists()
    known, other = (note for note in summary.notes if "not copied" in note)
    assert "they are links out of the folder" in known and "and 1 other are not copied" in known
    assert "chain is not copied, since it is a link out of the folder" in other
    assert "password" not in "".join(p.read_text() for p in out.glob("*.json"))


def test_links_within_the_folder_are_copied(tmp_path: Path) -> None:
    made = with_secret(tmp_path)
    (made[0] / "inner").mkdir()
    (made[0] / "inner" / "g.json").write_text("{}")
    (made[0] / "generation_config.json").symlink_to("inner/g.json")
    (made[0] / "modeling.py").symlink_to("../0/inner/../inner/g.json")
    whole = tmp_path / "link"
    whole.symlink_to(made[0])
    summary = merge_checkpoints(linear([whole, made[1]]), tmp_path / "out")
    for name in ("generation_config.json", "modeling.py"):
        assert (tmp_path / "out" / name).read_text() == "{}"
        assert not (tmp_path / "out" / name).is_symlink()
    assert not any("not copied" in note for note in summary.notes)


def test_the_hubs_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abc"
    made = write_model(snapshot, family(1)[0])
    (repository / "blobs").mkdir()
    write_tokenizer(made)
    (made / "additional_chat_templates").mkdir()
    (made / "additional_chat_templates" / "a.jinja").write_text("text")
    files = sorted(path for path in made.rglob("*") if path.is_file())
    for number, path in enumerate(files):
        blob = path.rename(repository / "blobs" / f"{number:040x}")
        path.symlink_to(os.path.relpath(blob, path.parent))
    other = write_model(tmp_path / "m1", family(1)[1])
    summary = merge_checkpoints(linear([made, other]), tmp_path / "out")
    assert not any("not copied" in note for note in summary.notes)
    for path in files:
        assert (tmp_path / "out" / path.relative_to(made)).exists()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret").write_text("x")
    (made / "vocab.txt").symlink_to("../../../../blobs/secret")
    (repository / "blobs" / "f").symlink_to("/etc/hostname")
    (made / "merges.txt").symlink_to("../../blobs/f")
    assert leads_out(made / "vocab.txt", made) and leads_out(made / "merges.txt", made)


# The index


@pytest.mark.parametrize("spelling", ["./{}", "{}/", ".//{}", "link"])
def test_two_names_of_one_shard(tmp_path: Path, spelling: str) -> None:
    state = family(1)[0]
    made = write_sharded(tmp_path / "s", state)
    path = made / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    (made / "link").symlink_to("model-00001-of-00003.safetensors")
    first = [n for n, file in index["weight_map"].items() if "00001" in file]
    assert len(first) > 1
    index["weight_map"][first[0]] = spelling.format(index["weight_map"][first[0]])
    path.write_text(json.dumps(index))
    if spelling == "link":
        (made / "link").rename(made / "link.safetensors")
        index["weight_map"][first[0]] = "link.safetensors"
        path.write_text(json.dumps(index))
    model = open_model(str(made))
    assert sorted(model.tensors) == sorted(state)
    assert not model.notes


def test_a_tensor_in_no_file_of_the_index(tmp_path: Path) -> None:
    made = write_sharded(tmp_path / "s", family(1)[0])
    path = made / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lost.weight"] = index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks tensors that the index says.*lost\.weight"):
        open_model(str(made))
    path.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(CheckpointError, match="'a' is in it twice"):
        open_model(str(made))


def test_an_index_that_says_less(tmp_path: Path) -> None:
    made = write_sharded(tmp_path / "s", {f"t{i}": torch.ones(1) for i in range(20)})
    path = made / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {"t0": index["weight_map"]["t0"]}
    path.write_text(json.dumps(index))
    notes = open_model(str(made)).notes
    assert len(notes) == 1  # the other files are not asked for
    assert "'t12', 't15', 't18', 't3' and 2 others are not in the index; they are read" in notes[0]


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\nerror: b", "\x00", "a\u202eb"])
@pytest.mark.parametrize("pickled", [True, False])
def test_names_that_would_write_on_the_terminal(tmp_path: Path, name: str, pickled: bool) -> None:
    state = {name: torch.ones(1), "b": torch.ones(1)}
    if pickled:
        torch.save(state, tmp_path / "m.bin")
    else:
        save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="cannot be shown") as caught:
        open_model(str(tmp_path / ("m.bin" if pickled else "m.safetensors")))
    assert str(caught.value).isprintable()


# Statistics files


def test_parts_that_are_of_other_shapes(tmp_path: Path) -> None:
    """The fingerprint is only a text in the file."""
    state = family(1, torch.float32)[1]
    small = {name: torch.ones(4, 4) for name, t in state.items() if t.dim() == 2}
    same = {"model": {"name": "", "class": "", "fingerprint": "1"}}
    one = write_statistics(tmp_path / "1", state, 1, change=same)
    other = write_statistics(tmp_path / "2", small, 2, change=same)
    for parts in ([one, other], [other, one]):
        with pytest.raises(ValueError, match="different shapes"):
            merge_files(parts, tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_an_alias_of_what_no_part_holds(tmp_path: Path) -> None:
    state = family(1, torch.float32)[1]
    path = write_statistics(
        tmp_path / "1", state, 1, change={"aliases": {"input_gram/x": "input_gram/y"}}
    )
    merged = merge_files([path], tmp_path / "all")
    assert merged.input_gram("x") is None
