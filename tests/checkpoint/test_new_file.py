"""Files of one's own that are the result of long work: whole, or what was there before, and what is
in the way is told beforehand.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pymerge.bench import results
from pymerge.checkpoint import new_file
from pymerge.cli.main import commands
from pymerge.errors import DiskFullError, OutputError
from pymerge.statistics import collect, load, merge_files


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    model = torch.nn.Linear(40, 3)
    made = [folder / "a", folder / "b"]
    for path in made:
        collect(model, [torch.randn(4, 40)], kinds=("input_gram",), out=path)
    return made


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does at the same places, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1, 1000, 3000])  # the header is longer than the second
def test_statistics_that_have_no_room_leave_what_was_there(parts, tmp_path, size):
    out = tmp_path / "s"
    for there in (False, True):
        if there:
            merge_files(parts[:1], out)
        before = out.read_bytes() if there else None
        with files_of_at_most(size), pytest.raises(DiskFullError, match=rf"{out}: would be larger"):
            merge_files(parts, out, overwrite=True)
        assert (out.read_bytes() if out.exists() else None) == before
        assert [path.name for path in tmp_path.iterdir()] == ["s"] * there


def test_measurements_that_have_no_room_leave_what_was_there(tmp_path):
    out = tmp_path / "r"
    row = results.Row("ties", "ties", "fp32", 2, 10, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    results.write(out, [row], [], {"cpu": "x"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert json.loads(before["r.json"])["machine"] == {"cpu": "x"}
    assert before["r.csv"].splitlines()[1].endswith(b",6,x")
    results.check_free(out)  # which knows them again
    with files_of_at_most(30), pytest.raises(DiskFullError, match=r"r\.json: would be larger"):
        results.write(out, [row, row], [], {"cpu": "y"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def never(batch: object) -> None:
    raise AssertionError("the data were read")


@pytest.fixture(params=["statistics", "measurements"])
def begin(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    """Work whose result goes into a file, up to where it would begin."""
    if request.param == "measurements":
        return results.check_free
    layer = torch.nn.Linear(3, 2)
    layer.register_forward_pre_hook(lambda *_: never(_))
    return lambda out: collect(
        layer, [torch.ones(1, 3)], kinds=("input_gram",), out=out, overwrite=True
    )


def test_names_that_there_cannot_be_are_told_before_the_work(begin, tmp_path):
    with pytest.raises(OutputError, match=r"cannot be written \(File name too long"):
        begin(tmp_path / ("n" * 245))
    assert list(tmp_path.iterdir()) == []


def test_a_umask_that_takes_the_file_from_its_maker_is_told_before_the_work(
    begin, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read anything
    with pytest.raises(OutputError, match="set another umask"):
        begin(tmp_path / "s")


def test_files_of_others_in_a_folder_of_all_are_told_before_the_work(parts, tmp_path, monkeypatch):
    """Where the system lets a file be replaced by its owner alone."""
    out = tmp_path / "s"
    merge_files(parts[:1], out)
    tmp_path.chmod(0o1777)
    owner = out.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(OutputError, match="belongs to another user and cannot be replaced"):
        merge_files(parts, out, overwrite=True)
    tmp_path.chmod(0o777)
    merge_files(parts, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_result_that_cannot_get_its_name_is_kept_and_the_reason_told(
    parts, tmp_path, monkeypatch
):
    out = tmp_path / "s"
    merge_files(parts[:1], out)
    plain = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(FileExistsError, match=r"could not get that name \(Device or") as error:
        merge_files(parts, out, overwrite=True)
    kept = Path(str(error.value).rpartition(" is ")[2])
    assert kept.name.endswith(".new") and kept.parent == tmp_path
    assert load(kept).counts("0" if "0" in load(kept).layers else "").tokens == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["s", kept.name])


def test_what_a_killed_run_left_goes_with_the_next_one_and_nothing_else(parts, tmp_path):
    out = tmp_path / "s"
    leftovers = [tmp_path / f".s.{letter * 8}.part" for letter in "abcdef"]
    for path in leftovers[:2]:
        path.write_bytes(b"half")
    leftovers[2].mkdir()
    leftovers[3].symlink_to(parts[0])
    os.mkfifo(leftovers[4])
    others = [tmp_path / name for name in (".s.0000000g.part", ".s.1.part", ".ss.aaaaaaaa.part")]
    for path in others:
        path.touch()
    with new_file.file_beside(tmp_path / "s") as (live, _):
        merge_files(parts, out)
        assert live.exists() and out.exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {path.name for path in (out, *leftovers[2:5], *others)}


def test_a_file_of_somebody_else_is_no_leftover(tmp_path, monkeypatch):
    (tmp_path / ".s.aaaaaaaa.part").touch()
    monkeypatch.setattr(os, "geteuid", lambda: 12345678)
    new_file.write(tmp_path / "s", b"text")
    assert (tmp_path / ".s.aaaaaaaa.part").exists()


def test_a_file_that_was_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """Between its creation and its lock."""
    plain, taken = new_file.is_locked, []

    def late(descriptor, **options):
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        return plain(descriptor, **options)

    monkeypatch.setattr(new_file, "is_locked", late)
    new_file.write(tmp_path / "s", b"text")
    assert len(taken) == 1 and (tmp_path / "s").read_bytes() == b"text"


@pytest.mark.parametrize("there", [False, True])
def test_a_complete_file_is_no_failure_where_its_first_name_stays(
    parts, tmp_path, monkeypatch, there
):
    out = tmp_path / "s"
    if there:
        merge_files(parts[:1], out)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if out.exists() and load(out).counts("0" if "0" in load(out).layers else "").tokens == 8:
            raise OSError(errno.EIO, "Input/output error")
        plain(self, missing_ok)

    plain = Path.unlink
    monkeypatch.setattr(Path, "unlink", unlink)
    assert merge_files(parts, out, overwrite=True) == out or out.exists()


def test_a_folder_from_which_nothing_is_deleted_is_told_before_the_work(
    begin, tmp_path, monkeypatch
):
    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(OutputError, match=r"cannot be written \(Operation not permitted"):
        begin(tmp_path / "s")


# Folders that the system forbids to look into: their files are not missing.


@pytest.fixture
def forbidden(tmp_path, monkeypatch) -> Path:
    """A folder without permissions; root would have them all the same."""
    folder = tmp_path / "secret"
    (folder / "model").mkdir(parents=True)
    plain = os.stat

    def looked_at(path, *args, **options):
        if isinstance(path, (str, Path)) and folder in Path(path).parents:
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(path, *args, **options)

    monkeypatch.setattr(os, "stat", looked_at)
    return folder


@pytest.mark.parametrize("inside", [".", "model"])
@pytest.mark.parametrize("command", ["merge", "plan", "verify", "adapter", "stats"])
def test_what_may_not_be_looked_at_is_not_said_to_be_missing(forbidden, inside, command, tmp_path):
    model = forbidden / inside
    reference = f"{tmp_path}+{model}" if command == "adapter" else str(model)
    models = [{"model": reference, "parameters": {"weight": 1}}]
    (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    (tmp_path / "t.txt").write_text("text")
    arguments = {
        "verify": ["verify", model],
        "plan": ["plan", tmp_path / "r.yml"],
        "stats": ["stats", model, tmp_path / "t.txt", "--out", tmp_path / "s"],
    }.get(command, ["merge", tmp_path / "r.yml", tmp_path / "out"])
    done = CliRunner().invoke(commands, [*map(str, arguments)])
    assert done.exit_code == 1, done.output
    assert f"{model}: cannot be looked at (Permission denied)" in done.output
    assert "does not exist" not in done.output and "holds no" not in done.output


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for call in (new_file.check_place, lambda path: new_file.write(path, b"x")):
        with pytest.raises(OutputError, match="a device, a pipe or a socket"):
            call(pipe)
    assert stat.S_ISFIFO(pipe.lstat().st_mode) and [*tmp_path.iterdir()] == [pipe]
