"""Other people's files around a merge: at its output's name, in what --overwrite replaces, in its
hidden folder.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import (
    recipe,
    write_family,
)
from output_cases import SHARD, Act, during, folder_with, is_result, partial, tree
from safetensors.torch import save_file

from pymerge.checkpoint import paths
from pymerge.checkpoint.folder import OutputFolder
from pymerge.engine.merge import merge_checkpoints
from pymerge.errors import OutputError


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return recipe("ties", write_family(tmp_path / "in", dtype=torch.float32), density=0.4)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "out"


@pytest.fixture(params=[True, False], ids=["exchange", "renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can swap two folders."""
    if not request.param:
        monkeypatch.setattr(paths, "exchange", lambda *_: False)
    return bool(request.param)


# What appears at the output's name.


def link_to_folder(path: Path) -> None:
    folder_with("a.txt")(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


APPEARS: dict[str, Act] = {
    "folder": folder_with("thesis/precious.txt"),
    "model": folder_with("config.json", "model.safetensors"),
    "hidden": folder_with(".x"),
    "file": lambda path: path.write_text("mine"),
    "link": link_to_folder,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("what", APPEARS)
def test_what_appears_is_not_replaced(config: Any, out: Path, what: str) -> None:
    """The finished model is kept; when the name is free, or by another, it is there without
    computing anything again.
    """
    with pytest.raises(OutputError, match="something appeared there") as caught:
        merge_checkpoints(
            config, out, out_shard_size=SHARD, progress=during(lambda: APPEARS[what](out))
        )
    held = partial(out)
    assert str(held) in str(caught.value) and "--resume" in str(caught.value)
    wanted = out.with_name("wanted")
    wanted.mkdir()
    before = tree(out.parent)
    for path in list(before):
        if path.startswith((held.name, "wanted")):
            del before[path]
    APPEARS[what](wanted / "out")
    assert before == tree(wanted)
    is_result(held, config)
    shutil.copytree(held, out.with_name("by hand"))
    is_result(out.with_name("by hand"), config)

    out.rename(out.with_name("aside"))
    summary = merge_checkpoints(config, out, out_shard_size=SHARD, resume=True)
    assert summary.resumed == len(summary.files) and summary.bytes_written == 0
    is_result(out, config)
    assert not held.exists()


def test_an_empty_folder_that_appears_is_taken(config: Any, out: Path) -> None:
    merge_checkpoints(config, out, progress=during(out.mkdir))
    is_result(out, config)


def rename_away(out: Path) -> None:
    out.rename(out.with_name("aside"))


def another_folder(out: Path) -> None:
    rename_away(out)
    shutil.copytree(out.with_name("aside"), out)


def to_link(out: Path) -> None:
    rename_away(out)
    out.symlink_to("aside")


CHANGES: dict[str, Act] = {
    "file added": folder_with("notes.txt"),
    "hidden file": folder_with(".notes"),
    "folder added": folder_with("src/main.py"),
    "model file added": folder_with("generation_config.json"),
    "model file changed": folder_with("config.json"),
    "another folder": another_folder,
    "a link": to_link,
    "a file": lambda out: (rename_away(out), out.write_text("mine")),
    "emptied": lambda out: [path.unlink() for path in out.iterdir()],
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_only_what_was_looked_at_is_replaced(
    config: Any, out: Path, exchange: bool, change: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """late: after the last look at it by its name."""
    merge_checkpoints(config, out, out_shard_size=SHARD)
    left: dict[str, str] = {}
    hidden = (f".{out.name}.pymerge-",)

    def act() -> None:
        CHANGES[change](out)
        left.update(tree(out.parent))

    def act_late(**options: Any) -> str:
        act()
        return mkdtemp(**options)

    mkdtemp = tempfile.mkdtemp
    if late:
        monkeypatch.setattr(tempfile, "mkdtemp", act_late)
    progress = None if late else during(act)
    with pytest.raises(OutputError, match="is complete but") as caught:
        merge_checkpoints(config, out, out_shard_size=SHARD, overwrite=True, progress=progress)
    assert str(partial(out)) in str(caught.value) and "--overwrite" in str(caught.value)
    now = tree(out.parent)
    for found in (left, now):
        for path in [path for path in found if path.startswith(hidden)]:
            del found[path]
    assert left == now
    is_result(partial(out), config)
    assert len(list(out.parent.glob(".out.pymerge-*"))) == 1


def test_a_model_that_is_deleted_meanwhile_is_no_obstacle(
    config: Any, out: Path, exchange: bool
) -> None:
    merge_checkpoints(config, out)
    merge_checkpoints(config, out, overwrite=True, progress=during(lambda: shutil.rmtree(out)))
    is_result(out, config)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# What --overwrite replaces.


def test_results_are_replaced_with_all_that_they_hold(
    config: Any, out: Path, exchange: bool, tmp_path: Path
) -> None:
    base = tmp_path / "in" / "base"
    for name in ("modeling_toy.py", "toy.tiktoken", "additional_chat_templates/tool.jinja"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    merge_checkpoints(config, out, out_shard_size=SHARD)
    assert (out / "modeling_toy.py").exists()
    (out / ".DS_Store").write_text("")
    shutil.rmtree(base / "additional_chat_templates")
    merge_checkpoints(config, out, overwrite=True)
    is_result(out, config)
    assert not (out / "additional_chat_templates").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "files",
    [
        ("config.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
        ("config.json", "model.safetensors", "tokenizer.model", "mergekit_config.yml", "README.md"),
    ],
)
def test_models_of_other_tools_are_replaced(config: Any, out: Path, files: Any) -> None:
    folder_with(*files)(out)
    merge_checkpoints(config, out, overwrite=True)
    is_result(out, config)


FOREIGN: dict[str, Act] = {
    "text": folder_with("notes.txt"),
    "sources": folder_with("src/main.py"),
    "repository": folder_with(".git/HEAD"),
    "hidden": folder_with(".env"),
    "code": folder_with("train.py"),
    "other format": folder_with("model.gguf"),
    "other weights": folder_with("embeddings.safetensors"),
    "other model": folder_with("word2vec.model"),
    "checkpoint": folder_with("checkpoint-5/model.safetensors"),
    "template": folder_with("additional_chat_templates/mine.jinja"),
    "template's neighbour": folder_with("additional_chat_templates/notes.txt"),
    "empty folder of templates": lambda out: (out / "additional_chat_templates").mkdir(),
    "empty folder": lambda out: (out / "empty").mkdir(),
    "folder for a file": folder_with("tokenizer.json/x"),
    "pipe": lambda out: os.mkfifo(out / "README.md"),
    "link": lambda out: (out / "data").symlink_to("/"),
    "link for a folder": lambda out: (out / "additional_chat_templates").symlink_to("/tmp"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_nothing_else_is_ever_replaced(config: Any, out: Path, what: str) -> None:
    folder_with("config.json", "model.safetensors")(out)
    FOREIGN[what](out)
    before = tree(out.parent)
    for options in ({}, {"dry_run": True}, {"resume": True}):
        with pytest.raises(OutputError, match="holds what no merge writes"):
            merge_checkpoints(config, out, overwrite=True, **options)
    assert tree(out.parent) == before


@pytest.mark.parametrize("where", ["out", "hidden"])
def test_folders_that_are_endlessly_deep(config: Any, out: Path, where: str) -> None:
    """They are no merge's, and looking at them ends."""
    folder = out if where == "out" else out.with_name(f".{out.name}.pymerge-partial")
    deep = "a/" * 700
    folder_with("model.safetensors")(folder)
    (folder / "pymerge_manifest.json").write_text(json.dumps({"copied": {f"{deep}b": "0" * 64}}))
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(700):
        os.mkdir("a", dir_fd=descriptor)
        inner = os.open("a", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
    try:
        with pytest.raises(OutputError, match=r"what no merge writes.*[ (]a/(a/){15}"):
            merge_checkpoints(config, out, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        subprocess.run(["rm", "-r", folder], check=True)  # which pytest's own way cannot


def test_foreign_files_are_named(config: Any, out: Path) -> None:
    folder_with("model.safetensors", "a.txt", "b/x", "c", "d", "e", ".f")(out)
    with pytest.raises(OutputError, match=r"writes: \.f, a\.txt, b/, c and 2 more; move"):
        merge_checkpoints(config, out, overwrite=True)


def test_a_manifest_makes_nothing_ours(config: Any, out: Path) -> None:
    folder_with("thesis.txt", "model.safetensors")(out)
    (out / "pymerge_manifest.json").write_text(json.dumps({"files": ["thesis.txt", "../x", 3]}))
    with pytest.raises(OutputError, match=r"writes: thesis\.txt"):
        merge_checkpoints(config, out, overwrite=True)


def test_links_to_files_go_and_the_files_stay(config: Any, out: Path) -> None:
    folder_with("model.safetensors")(out)
    kept = out.with_name("kept")
    kept.write_text("{}")
    (out / "config.json").symlink_to(kept)
    merge_checkpoints(config, out, overwrite=True)
    is_result(out, config)
    assert kept.read_text() == "{}"


def test_inputs_in_the_output(config: Any, out: Path, tmp_path: Path) -> None:
    """Also those whose names a merge writes, and those that a link leads to."""
    merge_checkpoints(config, out)
    before = tree(out)
    path = out / "mergekit_config.yml"
    path.write_text(json.dumps(config))
    with pytest.raises(OutputError, match=r"holds or lies in the input \S+mergekit_config\.yml"):
        merge_checkpoints(path, out, overwrite=True)
    path.unlink()
    weights = next((tmp_path / "in/base").glob("*.safetensors"))
    weights.rename(out / "pytorch_model.safetensors")
    weights.symlink_to(out / "pytorch_model.safetensors")
    with pytest.raises(OutputError, match="holds or lies in the input"):
        merge_checkpoints(config, out, overwrite=True)
    (out / "pytorch_model.safetensors").unlink()
    assert tree(out) == before


# What is bound to another place, and the output in it.
@pytest.mark.parametrize(
    ("bound", "inside"),
    [("in", ""), ("in", "m1"), ("in", "m1/new"), ("in/m1", "new"), ("in/m1", "")],
)
def test_inputs_in_the_output_by_another_name(tmp_path: Path, bound: str, inside: str) -> None:
    """A bind mount hides it; in a namespace of its own, where the system lets."""
    folders = write_family(tmp_path / "in", dtype=torch.float32)
    before = tree(tmp_path / "in")
    (tmp_path / "bound").mkdir()
    (tmp_path / "recipe.json").write_text(json.dumps(recipe("ties", folders, density=0.4)))
    out = tmp_path / "bound" / inside
    command = (
        f"mount --bind {tmp_path / bound} {tmp_path / 'bound'} || exit 77;"
        f" {sys.executable} -m pymerge merge {tmp_path / 'recipe.json'} {out} --overwrite"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, check=False
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("nothing can be mounted here")
    assert done.returncode == 1
    assert "is, holds or lies in the input" in done.stderr, done.stderr
    assert tree(tmp_path / "in") == before


@pytest.mark.parametrize("old", ["empty", "model"])
@pytest.mark.parametrize("mode", [0o700, 0o750, 0o777, 0o2775, 0o500])
def test_a_folder_keeps_its_permissions(config: Any, out: Path, old: str, mode: int) -> None:
    """And nobody reads meanwhile what is not to be read later."""
    if old == "model":
        merge_checkpoints(config, out)
    else:
        out.mkdir()
    out.chmod(mode)
    mode = stat.S_IMODE(out.stat().st_mode)
    seen = []
    watch = during(lambda: seen.append(stat.S_IMODE(partial(out).stat().st_mode)))
    merge_checkpoints(config, out, overwrite=True, progress=watch)
    assert stat.S_IMODE(out.stat().st_mode) == mode
    assert seen == [mode | 0o700]
    is_result(out, config)


def test_a_folder_keeps_its_owner(config: Any, out: Path) -> None:
    out.mkdir(mode=0o700)
    try:
        os.chown(out, 1234, 4321)
    except PermissionError:
        pytest.skip("only root can give a folder away")
    merge_checkpoints(config, out, overwrite=True)
    status = out.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 4321, 0o700)


def test_the_working_directory(config: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.mkdir()
    monkeypatch.chdir(out)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputError, match="working directory"):
            merge_checkpoints(config, ".", **options)
    assert list(out.iterdir()) == []


def test_a_mount_point(config: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="mount point"):
        merge_checkpoints(config, "/dev", overwrite=True)
    assert paths.is_mount(Path("/proc")) and not paths.is_mount(Path("/proc/self"))


def test_names_that_cannot_be(config: Any, out: Path) -> None:
    out.symlink_to("out")
    for name in (out, out.with_name("x" * 240), f"{out}\0"):
        with pytest.raises(OutputError, match=r"cannot be a folder|is not a folder"):
            merge_checkpoints(config, name, dry_run=True)


def test_links_at_the_output_are_followed(config: Any, out: Path) -> None:
    out.symlink_to("target")
    merge_checkpoints(config, out)
    merge_checkpoints(config, out, overwrite=True)
    assert out.is_symlink()
    is_result(out.with_name("target"), config)


def test_statistics_in_the_output(tmp_path: Path) -> None:
    """A model folder that also holds the statistics of a model is not replaced."""
    folders = write_family(tmp_path)
    out = tmp_path / "out"
    merge_checkpoints(recipe("linear", folders), out)
    save_file({"a": torch.zeros(3)}, out / "m1.statistics.safetensors")
    with pytest.raises(OutputError, match=r"writes: m1\.statistics\.safetensors"):
        merge_checkpoints(recipe("linear", folders), out, overwrite=True)


# What lies at the hidden folder's name.


def test_a_hidden_folder_that_is_a_link(config: Any, out: Path) -> None:
    folder_with("precious.txt", ".lock", "pymerge_manifest.json")(out.with_name("home"))
    partial(out).symlink_to("home")
    before = tree(out.parent)
    for options in ({}, {"resume": True}, {"dry_run": True}):
        with pytest.raises(OutputError, match=f"{partial(out)}, .* is not a folder"):
            merge_checkpoints(config, out, **options)
    assert tree(out.parent) == before


def hard_link(held: Path, name: str) -> None:
    os.link(held.parent / "precious", held / name)


STRANGE: dict[str, Act] = {
    "no mark": folder_with("model.safetensors"),
    "other files": folder_with(".lock", "precious.txt"),
    "other folders": folder_with(".lock", "sub/precious.txt"),
    "lock is a link": lambda held: (held / ".lock").symlink_to("../precious"),
    "lock is a pipe": lambda held: os.mkfifo(held / ".lock"),
    "lock is a folder": folder_with(".lock/x"),
    "output is a link": lambda held: (
        folder_with(".lock")(held),
        (held / "model.safetensors").symlink_to("../precious"),
    ),
    "new file is a link": lambda held: (
        folder_with(".lock")(held),
        (held / ".README.md.new").symlink_to("../precious"),
    ),
    "output is a folder": folder_with(".lock", "model.safetensors/x"),
    "of somebody else": lambda held: os.chown(held, 12345, 12345),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_hidden_folder_that_no_merge_left(config: Any, out: Path, what: str) -> None:
    if what == "of somebody else" and os.geteuid() != 0:
        pytest.skip("takes root")
    partial(out).mkdir()
    out.with_name("precious").write_text("mine")
    STRANGE[what](partial(out))
    before = tree(out.parent)
    for options in ({}, {"resume": True}, {"dry_run": True}):
        with pytest.raises(OutputError, match=f"{partial(out)}, .*move it away"):
            merge_checkpoints(config, out, **options)
    assert tree(out.parent) == before


@pytest.mark.parametrize("name", [".lock", "model.safetensors", ".README.md.new", "config.json"])
def test_hard_links_in_the_hidden_folder(config: Any, out: Path, name: str) -> None:
    folder_with(".lock")(partial(out))
    out.with_name("precious").write_text("mine")
    (partial(out) / name).unlink(missing_ok=True)
    os.link(out.with_name("precious"), partial(out) / name)
    merge_checkpoints(config, out)
    is_result(out, config)
    assert out.with_name("precious").read_text() == "mine"


def test_links_planted_meanwhile_are_not_followed(config: Any, out: Path) -> None:
    precious = out.with_name("precious")
    precious.write_text("mine")

    def plant() -> None:
        for name in ("model-00006-of-00006.safetensors", ".pymerge_manifest.json.new"):
            (partial(out) / name).unlink(missing_ok=True)
            (partial(out) / name).symlink_to(precious)

    merge_checkpoints(config, out, out_shard_size=SHARD, progress=during(plant, 2))
    assert precious.read_text() == "mine"
    is_result(out, config)
    assert len(list(out.glob("model-*"))) == 6


def test_an_empty_hidden_folder_is_taken(config: Any, out: Path) -> None:
    partial(out).mkdir()
    merge_checkpoints(config, out)
    is_result(out, config)


def test_where_no_further_file_can_be_opened_nothing_is_left(out: Path) -> None:
    folder = OutputFolder(out, (), overwrite=False)
    folder.open()
    folder.write("config.json", b"{}")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        folder.discard()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for each in opened:
            os.close(each)
    assert list(out.parent.iterdir()) == []
