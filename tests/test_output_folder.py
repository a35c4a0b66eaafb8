"""Other people's files around a merge: what is at its output's name, in its hidden folder, and what happens to both meanwhile."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import (
    assert_same,
    expected,
    family,
    read_result,
    recipe,
    write_family,
    write_model,
)
from safetensors.torch import save_file

from pymerge.checkpoint import names
from pymerge.checkpoint.folder import OutputFolder
from pymerge.engine import merge_checkpoints, plan_checkpoints
from pymerge.errors import CheckpointError, MergeError, OutputError

SHARD = 1500
Act = Callable[[Path], object]


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
        monkeypatch.setattr(names, "exchange", lambda *_: False)
    return bool(request.param)


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.pymerge-partial")


def during(act: Callable[[], object], at: int = 5) -> Callable[..., None]:
    """A progress callback that does something once, in the middle of the merge."""
    seen: list[str] = []

    def progress(done: int, total: int, name: str) -> None:
        seen.append(name)
        if len(seen) == at:
            act()

    return progress


def tree(folder: Path) -> dict[str, str]:
    """Every entry with its content, links by where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes().hex()
        else:
            found[str(path.relative_to(folder))] = "folder" if path.is_dir() else "other"
    return found


def is_result(folder: Path, config: Any) -> None:
    assert_same(read_result(folder), expected(config, family(dtype=torch.float32)))
    assert {"config.json", "README.md", "pymerge_manifest.json"} <= set(tree(folder))
    assert not (folder / ".lock").exists()


# What appears at the output's name.


def folder_with(*files: str) -> Act:
    def make(path: Path) -> None:
        for file in files:
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_text(f"mine: {file}")

    return make


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
    """The finished model is kept; when the name is free, or by another, it is there without computing anything again."""
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


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_was_looked_at_is_replaced(
    config: Any, out: Path, exchange: bool, change: str
) -> None:
    merge_checkpoints(config, out, out_shard_size=SHARD)
    left: dict[str, str] = {}

    def act() -> None:
        CHANGES[change](out)
        left.update(tree(out.parent))

    with pytest.raises(OutputError, match="is complete but") as caught:
        merge_checkpoints(config, out, out_shard_size=SHARD, overwrite=True, progress=during(act))
    assert str(partial(out)) in str(caught.value) and "--overwrite" in str(caught.value)
    now = tree(out.parent)
    assert {k: v for k, v in left.items() if not k.startswith(partial(out).name)} == {
        k: v for k, v in now.items() if not k.startswith(partial(out).name)
    }
    is_result(partial(out), config)


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
    (out / "generation_config.json").write_text("{}")
    (tmp_path / "in/base/generation_config.json").symlink_to(out / "generation_config.json")
    with pytest.raises(OutputError, match="holds or lies in the input"):
        merge_checkpoints(config, out, overwrite=True)
    (out / "generation_config.json").unlink()
    assert tree(out) == before


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
    assert names.is_mount(Path("/proc")) and not names.is_mount(Path("/proc/self"))


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


# What cannot be deleted.


def test_an_old_model_that_cannot_be_deleted(
    config: Any, out: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_checkpoints(config, out)
    unlink = os.unlink

    def failing(path: Any, **options: Any) -> None:
        if path == "model.safetensors":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", failing)
    summary = merge_checkpoints(config, out, out_shard_size=SHARD, overwrite=True)
    is_result(out, config)
    (old,) = [path for path in out.parent.iterdir() if path != out]
    assert tree(old).keys() == {"model.safetensors"}
    (note,) = [note for note in summary.notes if str(old) in note]
    assert "model.safetensors: Operation not permitted" in note


def test_an_immutable_file(config: Any, out: Path) -> None:
    merge_checkpoints(config, out)
    if (
        shutil.which("chattr") is None
        or subprocess.run(
            ["chattr", "+i", out / "config.json"], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("no immutable files here")
    try:
        summary = merge_checkpoints(config, out, overwrite=True)
    finally:
        for path in out.parent.rglob("config.json"):
            subprocess.run(["chattr", "-i", path], check=True)
    is_result(out, config)
    assert any("held before could not be deleted (config.json: " in n for n in summary.notes)


def test_an_old_model_that_somebody_writes_to(
    config: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through its open folder, after it was exchanged: what they write is kept."""
    merge_checkpoints(config, out)
    fd = os.open(out, os.O_RDONLY)
    rmdir = Path.rmdir

    def late(path: Path) -> None:
        if "pymerge-old" in path.name:
            os.close(os.open("late.txt", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", late)
    summary = merge_checkpoints(config, out, overwrite=True)
    os.close(fd)
    is_result(out, config)
    (old,) = [path for path in out.parent.iterdir() if path != out]
    assert tree(old) == {"late.txt": ""} and any(str(old) in note for note in summary.notes)


# What happens to the files that are finished.


def first(out: Path) -> Path:
    return next(iter(sorted(partial(out).glob("model-*"))))


def same_size(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()
    path.with_name("x").write_bytes(bytes(size))
    path.with_name("x").rename(path)


LOST: dict[str, tuple[Act, str]] = {
    "weights vanish": (lambda out: first(out).unlink(), "00001-of-.* vanished while"),
    "weights shrink": (lambda out: os.truncate(first(out), 100), "00001-of-.* to 100 bytes"),
    "weights are others": (lambda out: same_size(first(out)), "00001-of-.* was replaced"),
    "weights are a folder": (
        lambda out: (
            first(out).unlink(),
            (partial(out) / "model-00001-of-00006.safetensors").mkdir(),
        ),
        "00001-of-.* was replaced",
    ),
    "config": (lambda out: (partial(out) / "config.json").unlink(), "config.json vanished"),
    "card": (lambda out: (partial(out) / "README.md").write_text("x"), "README.md went from"),
    "index": (
        lambda out: (partial(out) / "model.safetensors.index.json").unlink(),
        "index.json vanished",
    ),
    "folder": (lambda out: shutil.rmtree(partial(out)), "was deleted or replaced while"),
    "folder renamed": (
        lambda out: partial(out).rename(out.with_name("aside")),
        "was deleted or replaced while",
    ),
    "another folder": (
        lambda out: (partial(out).rename(out.with_name("aside")), partial(out).mkdir()),
        "was deleted or replaced while",
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_files_that_are_lost(config: Any, out: Path, what: str) -> None:
    act, message = LOST[what]
    with pytest.raises(OutputError, match=message):
        merge_checkpoints(config, out, out_shard_size=SHARD, progress=during(lambda: act(out), 6))
    assert not out.exists()
    if what == "another folder":
        assert list(partial(out).iterdir()) == [], "it is not ours to delete"
    elif what != "weights are a folder":
        assert not partial(out).exists()


def test_files_that_are_as_they_were_are_not_read_again(
    config: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutputFolder, "sha256", lambda *_: pytest.fail("read again"))
    merge_checkpoints(config, out, out_shard_size=SHARD)


def test_files_of_another_number_are_read_again(config: Any, out: Path) -> None:
    """As on network file systems that number files anew."""

    def copy() -> None:
        shutil.copy(first(out), out.with_name("x"))
        out.with_name("x").rename(first(out))

    merge_checkpoints(config, out, out_shard_size=SHARD, progress=during(copy, 6))
    is_result(out, config)


@pytest.mark.parametrize("what", ["folder", "folder renamed"])
def test_a_folder_that_is_lost_at_the_last_tensor(config: Any, out: Path, what: str) -> None:
    """With one file, which is open all the time."""
    with pytest.raises(OutputError, match=LOST[what][1]):
        merge_checkpoints(config, out, progress=during(lambda: LOST[what][0](out), 9))
    assert not out.exists()


def test_files_that_were_taken_over_are_looked_after_too(config: Any, out: Path) -> None:
    with pytest.raises(OutputError):
        merge_checkpoints(config, out, out_shard_size=SHARD, progress=during(folder_with_x(out)))
    shutil.rmtree(out)
    with pytest.raises(OutputError, match="vanished"):
        merge_checkpoints(
            config,
            out,
            out_shard_size=SHARD,
            resume=True,
            progress=during(lambda: first(out).unlink()),
        )
    assert not out.exists()


def folder_with_x(out: Path) -> Callable[[], object]:
    return lambda: folder_with("x")(out)


def test_a_lock_that_is_cleaned_away(config: Any, out: Path) -> None:
    merge_checkpoints(config, out, progress=during((partial(out) / ".lock").unlink))
    is_result(out, config)


def test_a_lock_of_another(config: Any, out: Path) -> None:
    lock = partial(out) / ".lock"
    with pytest.raises(OutputError, match="another merge took over"):
        merge_checkpoints(config, out, progress=during(lambda: (lock.unlink(), lock.touch())))
    assert lock.exists() and not out.exists()


# What would fail at the end.


def pipe(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)


UNREADABLE: dict[str, Act] = {
    "folder": lambda path: path.mkdir(),
    "dangling link": lambda path: path.symlink_to("gone"),
    "pipe": pipe,
    "too large": sparse,
}


@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_small_files_that_cannot_be_read(
    config: Any, out: Path, tmp_path: Path, name: str, what: str
) -> None:
    """Each is named, and all of them before any work."""
    for file in (name, "preprocessor_config.json"):
        UNREADABLE[what](tmp_path / "in/base" / file)
    wanted = [str(tmp_path / "in/base" / name), "preprocessor_config.json"]
    problems = plan_checkpoints(config).problems
    assert len(problems) == 2
    for text in (str(problems), refused(config, out), refused(config, out, dry_run=True)):
        assert all(each in text for each in wanted) and "cannot be read" in text
    assert list(out.parent.iterdir()) == []


def refused(config: Any, out: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        merge_checkpoints(config, out, **options)
    return str(caught.value)


def test_small_files_are_read_at_the_start(config: Any, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "in/base/generation_config.json"
    path.write_text('{"top_k": 1}')
    merge_checkpoints(config, out, progress=during(path.unlink))
    assert (out / "generation_config.json").read_text() == '{"top_k": 1}'


def test_half_a_surrogate_pair(out: Path, tmp_path: Path) -> None:
    """In a config it stays what it was; in a text it is no character."""
    held = {"model_type": "llama", "a": "\ud800", "\udfff": ["\\\ud83d", "\U0001f600"]}
    folder = write_model(tmp_path / "m", family(0)[0], held)
    config: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    merge_checkpoints(config, out)
    written = json.loads((out / "config.json").read_bytes())
    assert {key: written[key] for key in held} == held
    config["chat_template"] = "{{ messages[0].content }}\ud800"
    with pytest.raises(MergeError, match=r"chat_template .*U\+D800"):
        merge_checkpoints(config, out.with_name("other"), dry_run=True)


def test_names_that_are_not_utf_8(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"m\xff")
    write_model(tmp_path / "m", family(0)[0]).rename(folder)
    config = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    made = out.with_name(os.fsdecode(b"out\xfe"))
    for full in (False, True):
        merge_checkpoints(config, made, overwrite=full, full_paths=full)
        assert (made / "README.md").read_text(encoding="utf-8").count(r"m\udcff") == 1
        manifest = json.loads((made / "pymerge_manifest.json").read_text(encoding="utf-8"))
        assert manifest["inputs"][0]["model"] == (str(folder) if full else folder.name)


# Paths.


def test_no_local_paths_unless_asked_for(config: Any, out: Path, tmp_path: Path) -> None:
    config["tokenizer_source"] = str(tmp_path / "in/m1")
    for folder in (tmp_path / "in").iterdir():
        content = {"model": {"vocab": {f"t{i}": i for i in range(37)}}}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    merge_checkpoints(config, out, out_shard_size=SHARD)
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    card = (out / "README.md").read_text()
    assert "base_model: base\n" in card and "- model: m1\n" in card and "\n- m2\n" in card
    merge_checkpoints(config, out, overwrite=True, full_paths=True)
    for name in ("README.md", "pymerge_manifest.json"):
        assert (out / name).read_text().count(str(tmp_path / "in/m1")) == 3
    assert f"\n- {tmp_path}/in/m2\n" in (out / "README.md").read_text()


def test_models_of_one_name_are_told_apart(config: Any, out: Path, tmp_path: Path) -> None:
    """The same files, as sizes and times tell, in another folder."""
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(
            config,
            out,
            out_shard_size=SHARD,
            progress=during(lambda: os.kill(os.getpid(), signal.SIGINT), 6),
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "in/m1").rename(tmp_path / "other/m1")
    config["models"][0]["model"] = str(tmp_path / "other/m1")
    with pytest.raises(OutputError, match="its models lie in other folders"):
        merge_checkpoints(config, out, out_shard_size=SHARD, resume=True)


def test_resume_with_other_paths_shown(config: Any, out: Path) -> None:
    with pytest.raises(OutputError, match="something appeared"):
        merge_checkpoints(config, out, progress=during(folder_with_x(out)))
    shutil.rmtree(out)
    assert merge_checkpoints(config, out, resume=True, full_paths=True).resumed == 1


# Ctrl-C.


@pytest.mark.parametrize("overwrite", [False, True])
def test_ctrl_c_while_the_result_gets_its_name(
    config: Any, out: Path, exchange: bool, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        merge_checkpoints(config, out)
    rename = Path.rename

    def interrupting(path: Path, target: Path) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupting)
    with pytest.raises(KeyboardInterrupt, match="out was complete"):
        merge_checkpoints(config, out, out_shard_size=SHARD, overwrite=overwrite)
    is_result(out, config)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_first_file_with_a_model_there(config: Any, out: Path) -> None:
    merge_checkpoints(config, out)
    before = tree(out.parent)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(
            config,
            out,
            overwrite=True,
            progress=during(lambda: os.kill(os.getpid(), signal.SIGINT), 1),
        )
    assert tree(out.parent) == before


def test_statistics_in_the_output(tmp_path: Path) -> None:
    """A model folder that also holds the statistics of a model is not replaced."""
    folders = write_family(tmp_path)
    out = tmp_path / "out"
    merge_checkpoints(recipe("linear", folders), out)
    save_file({"a": torch.zeros(3)}, out / "m1.statistics.safetensors")
    with pytest.raises(OutputError, match=r"writes: m1\.statistics\.safetensors"):
        merge_checkpoints(recipe("linear", folders), out, overwrite=True)
