"""The files of a result until it has its name: what cannot be read or deleted, what is lost, what
they tell, and Ctrl-C.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folder_cases import (
    family,
    recipe,
    write_family,
    write_model,
)
from output_cases import SHARD, Act, during, folder_with, is_result, partial, tree

from pymerge.checkpoint import paths
from pymerge.checkpoint.folder import OutputFolder
from pymerge.engine.card import ShortNames, model_card
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import CheckpointError, MergeError, OutputError
from pymerge.recipe.resolve import read_recipe


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


@pytest.mark.parametrize("back", [True, False])
def test_a_folder_that_loses_its_permissions_between_two_renames(
    config: Any, out: Path, back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the error says lies where lies there, and the lock goes."""
    merge_checkpoints(config, out)
    before = tree(out)
    swapped: list[bool] = []
    rename, swap = Path.rename, paths.exchange

    def renaming(path: Path, target: Path) -> Path:
        if ".pymerge-old-" in target.name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(path, target)

    def swapping(one: Path, other: Path) -> bool:
        if swapped and not back:
            raise PermissionError(errno.EACCES, "Permission denied")
        swapped.append(swap(one, other))
        return swapped[-1]

    monkeypatch.setattr(Path, "rename", renaming)
    monkeypatch.setattr(paths, "exchange", swapping)
    with pytest.raises(OutputError) as caught:
        merge_checkpoints(config, out, out_shard_size=SHARD, overwrite=True)
    if not all(swapped):
        pytest.skip("no exchange of folders here")
    partial = out.with_name(f".{out.name}.pymerge-partial")
    assert tree(out if back else partial) == before
    is_result(partial if back else out, config)
    said = "It is in" if back else f"{out} has the result, but what was there before is in"
    assert f"{said} {partial}" in str(caught.value)


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


def newest(out: Path) -> Path:
    """The one that is being written."""
    return max(partial(out).glob("model-*"))


LOST: dict[str, tuple[Act, str]] = {
    "weights shrink while they are written": (
        lambda out: os.truncate(newest(out), 100),
        r"went from \d+ to \d+ bytes while it was written",
    ),
    "weights grow while they are written": (
        lambda out: os.truncate(newest(out), 1 << 20),
        r"went from \d+ to 1048576 bytes while it was written",
    ),
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


TRUNCATING = """
import os, sys
from pathlib import Path
from pymerge.checkpoint import writer

slot, file = writer.ShardWriter.slot, Path(sys.argv[3])

def truncated(own, nbytes):
    found = slot(own, nbytes)
    os.truncate(file, 100)
    return found

writer.ShardWriter.slot = truncated
if sys.argv.pop(1) == "command":
    from pymerge.cli.main import commands
    sys.argv[1:] = ["merge", sys.argv[1], "out", "-q"]
    commands()
import pymerge
try:
    pymerge.merge_checkpoints(sys.argv[1], "out")
except pymerge.errors.OutputError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize("door", ["command", "Python"])
@pytest.mark.parametrize("block", [False, True], ids=["large", "block"])
def test_a_large_tensor_whose_file_is_truncated_while_it_is_made(
    tmp_path: Path, door: str, block: bool
) -> None:
    """It is not made in a mapping of that file, which would end the process."""
    elements = 1000 if block else 10 << 20
    states = [{"w": torch.randn(elements)} for _ in range(3)]
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    (tmp_path / "r.yml").write_text(json.dumps(recipe("ties", folders, density=0.4)))
    done = subprocess.run(
        [
            *(sys.executable, "-c", TRUNCATING, door, "r.yml"),
            ".out.pymerge-partial/model.safetensors",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert re.match(
        r"error: .*model.safetensors: went from \d+ to 100 bytes while it was written", done.stderr
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2", "r.yml"]


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
        merge_checkpoints(
            config, out, out_shard_size=SHARD, progress=during(lambda: folder_with("x")(out))
        )
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
        assert all(each in text for each in wanted) and "mend it, or move it away" in text
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


def test_the_card_names_the_hubs_models_as_hubs_read_them(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    text = f"""
merge_method: task_arithmetic
base_model: some/base@v1
models:
  - model: some/tuned+other/adapter
    parameters: {{weight: 0.5}}
  - model: {tmp_path / "here"}
    parameters: {{weight: 0.5}}
"""
    _, front, _ = model_card(read_recipe(yaml.safe_load(text)), "out").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": ["some/base", "some/tuned", "other/adapter"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "mergekit", "pymerge"],
    }


def test_relative_paths_are_shortened_too(
    config: Any, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the working directory and those of the recipe's folder; hub ids stay."""
    (tmp_path / "recipes/deep").mkdir(parents=True)
    (tmp_path / "in/m1").rename(tmp_path / "recipes/deep/m1")
    written = {**config, "base_model": "in/base"}
    written["models"][0]["model"] = "deep/m1"
    written["models"][1]["model"] = "../in/m2"
    path = tmp_path / "recipes/r.yml"
    path.write_text(json.dumps(written))
    monkeypatch.chdir(tmp_path)
    merge_checkpoints(path, out)
    for name in ("README.md", "pymerge_manifest.json"):
        text = (out / name).read_text()
        assert not any(each in text for each in ("in/base", "deep/m1", "in/m2", "recipes")), name
    assert "\n- m1\n" in (out / "README.md").read_text()


def test_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/maths/v1", "a/code/v1", "b/code/v1", "v2"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = ShortNames(
        ["a/maths/v1", f"{tmp_path}/a/code/v1", "./b/code/v1", "v2", "own/er@r", "a/maths/sa.st"]
    )
    asked = ["a/maths/v1", f"{tmp_path}/a/maths/v1", "a/code/v1", "../b/code/v1", "v2", "own/er"]
    assert [names.of(each) for each in asked] == [
        *("maths/v1", "maths/v1", "a/code/v1", "b/code/v1", "v2", "own/er"),
    ]
    assert [
        names.of(each)
        for each in ("../x/y", "./x/y", "~/x/y", "~nobody-here/y", "//x/y", "x/y", "..")
    ] == [
        *("y", "y", "y", "y", "y", "x/y", tmp_path.parent.name),
    ]
    text = "tokenizer_source: base\nmodels: [{model: own/er, statistics: x/sa.st}]\n"
    assert names.recipe(text) == (
        "tokenizer_source: base\nmodels:\n- model: own/er\n  statistics: sa.st\n"
    )


def test_models_of_one_name_are_told_apart_in_the_card(
    config: Any, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "in/m2").rename(tmp_path / "other/m1")
    config["models"][1]["model"] = str(tmp_path / "other/m1")
    merge_checkpoints(config, out)
    card = (out / "README.md").read_text()
    assert "\n- in/m1\n- other/m1\n" in card and "- model: other/m1\n" in card
    manifest = json.loads((out / "pymerge_manifest.json").read_text())
    assert {"in/m1", "other/m1", "base"} == {entry["model"] for entry in manifest["inputs"]}
    assert str(tmp_path) not in json.dumps(manifest) + card


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
        merge_checkpoints(config, out, progress=during(lambda: folder_with("x")(out)))
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


def test_ctrl_c_when_a_merge_is_taken_up_again(
    config: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is made: what was finished is not lost."""
    with pytest.raises(OutputError):
        merge_checkpoints(
            config, out, out_shard_size=SHARD, progress=during(lambda: folder_with("x")(out))
        )
    shutil.rmtree(out)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(OutputFolder, "write", stop)
        merge_checkpoints(config, out, out_shard_size=SHARD, resume=True)
    summary = merge_checkpoints(config, out, out_shard_size=SHARD, resume=True)
    assert summary.resumed == len(summary.files)
    is_result(out, config)


def test_a_finished_file_that_is_blanked_with_its_time_put_back(
    config: Any, out: Path, tmp_path: Path
) -> None:
    def blank() -> None:
        file = sorted(partial(out).glob("*.safetensors"))[0]
        status = file.stat()
        os.truncate(file, 0)
        os.truncate(file, status.st_size)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(OutputError, match="was replaced"):
        merge_checkpoints(config, out, out_shard_size=SHARD, progress=during(blank))
    assert list(out.parent.iterdir()) == []


def test_code_of_others_in_the_hidden_folder(config: Any, out: Path) -> None:
    """A name that a merge may write is not enough: the manifest there tells what it did write."""
    partial(out).mkdir()
    (partial(out) / ".lock").touch()
    (partial(out) / "my_code.py").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"holds what no merge writes \(my_code\.py\)"):
            merge_checkpoints(config, out, resume=resume)
    assert (partial(out) / "my_code.py").read_text() == "mine"


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "code.py"])
def test_small_files_that_are_links_in_a_circle(
    config: Any, out: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "in/base" / name).symlink_to(name)
    with pytest.raises(CheckpointError, match=f"{name}: .*mend it, or move it away"):
        merge_checkpoints(config, out)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_input_that_is_a_link_into_the_output(
    config: Any, out: Path, tmp_path: Path, name: str
) -> None:
    merge_checkpoints(config, out)
    link = tmp_path / "in/base" / name
    link.unlink(missing_ok=True)
    (out / name).write_text('{"architectures": ["X"]}')
    link.symlink_to(out / name)
    with pytest.raises(OutputError, match="holds or lies in the input"):
        merge_checkpoints(config, out, overwrite=True)
    assert link.read_text() == '{"architectures": ["X"]}'
