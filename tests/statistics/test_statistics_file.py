"""The statistics file: format, merging, interruption (S10 to S13 of docs/spec/statistics.md)."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pymerge.errors import CheckpointError, DiskFullError, OutputError
from pymerge.statistics import KINDS, Counts, Prediction, Progress, collect, load, merge_files
from pymerge.statistics._file import pack, triangle_side, unpack

OPTIONS = {"loss": lambda model, batch: Prediction(model(batch)), "kinds": KINDS}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4))


def data(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(3, 5, generator=generator) for _ in range(count)]


def close(one, other, rtol: float = 3e-7) -> None:
    """All sums to fp32 rounding of their largest element, all counts exactly."""
    assert one.header["tensors"] == other.header["tensors"]
    for key in one.header["tensors"]:
        a, b = one._read(key), other._read(key)
        assert (a - b).abs().max() <= rtol * b.abs().max(), key


@pytest.mark.parametrize("size", [0, 1, 2, 3, 511, 512, 513, 1100])
def test_triangles(size):  # S10
    matrix = torch.randn(size, size)
    matrix = matrix + matrix.T
    packed = pack(matrix)
    assert packed.shape == (size * (size + 1) // 2,)
    assert torch.equal(unpack(packed), matrix)
    if size > 2:
        assert packed[1 * size - 1 * 0 // 2 + 2 - 1] == matrix[1, 2]
        assert packed[2 * size - 2 * 1 // 2 + 2 - 2] == matrix[2, 2]


def test_only_triangular_numbers_are_triangles():
    with pytest.raises(ValueError, match="no triangular number"):
        triangle_side(4)
    for size in (10_954, 28_672, 100_003):
        assert triangle_side(size * (size + 1) // 2) == size


def test_file_is_plain_safetensors(tmp_path):  # S10
    path = tmp_path / "s.safetensors"
    stats = collect(model(), data(), out=path, model_name="tiny", **OPTIONS)
    with safe_open(str(path), "pt") as file:
        assert file.metadata()["format"] == "pymerge.statistics"
        header = json.loads(file.metadata()["statistics"])
        assert sorted(file.keys()) == sorted(header["tensors"])
        assert file.get_tensor("input_gram/0").dtype == torch.float32
        assert file.get_tensor("input_gram/0").shape == (15,)
        assert file.get_tensor("diagonal_fisher/3.weight").shape == (4, 6)
        assert file.get_tensor("block_fisher/2.weight").shape == (21,)
    assert header["normalisation"] == "sum"
    assert header["model"]["name"] == "tiny"
    assert header["data"] == [
        {"digest": stats.header["data"][0]["digest"], "batches": 6, "examples": 18, "tokens": 18}
    ]
    assert header["layers"]["3"] == {
        "d_in": 6,
        "d_out": 4,
        "transposed": False,
        "weight": "3.weight",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_reader(tmp_path):  # S12
    path = tmp_path / "s.safetensors"
    stats = collect(model(), data(), out=path, **OPTIONS)
    assert stats.layers == ("0", "3")
    assert stats.counts("0") == Counts(tokens=18, examples=18, draws=18)
    assert stats.counts("0", "input_gram").draws == 0
    x = torch.cat(data()).double()
    torch.testing.assert_close(stats.input_gram("0"), (x.T @ x / 18).float())
    assert torch.equal(stats.input_gram("0.weight"), stats.input_gram("0"))
    assert torch.equal(stats.input_gram("0"), stats.input_gram("0").T)
    assert torch.equal(unpack(stats.packed("input_gram", "0")), stats.input_gram("0", mean=False))
    assert stats.input_gram("nowhere") is None
    assert stats.diagonal_fisher("nowhere") is None
    assert stats.counts("nowhere") == Counts(0, 0, 0)
    assert "2 layers" in repr(stats)
    with pytest.raises(ValueError, match="not stored as a triangle"):
        stats.packed("diagonal_fisher", "0.weight")
    gram = stats.input_gram("0", mean=False)
    gram.zero_()
    assert float(stats.input_gram("0", mean=False).abs().sum()) > 0


def test_save_and_load(tmp_path):
    stats = collect(model(), data(), **OPTIONS)
    stats.save(tmp_path / "deep" / "s.safetensors")
    again = load(tmp_path / "deep" / "s.safetensors")
    assert again.header == stats.header
    for key in stats.header["tensors"]:
        assert torch.equal(stats._read(key), again._read(key))


def test_a_file_that_changes_after_it_was_opened(tmp_path):
    """Another one by its name is no matter; what happens to the file itself is an error."""
    path = tmp_path / "s.safetensors"
    collect(model(), data(), **OPTIONS, out=path)
    found = load(path)
    before = found.input_gram(found.layers[0])
    (tmp_path / "other").write_bytes(path.read_bytes())
    (tmp_path / "other").replace(path)
    assert torch.equal(found.input_gram(found.layers[0]), before)
    again = load(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"s.safetensors: was truncated"):
        again.input_gram(found.layers[0])


def test_files_that_are_not_statistics(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no statistics file"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(tmp_path / "bad.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a statistics file"):
        load(tmp_path / "other.safetensors")
    save_file(
        {},
        tmp_path / "new.safetensors",
        {"format": "pymerge.statistics", "version": "9", "statistics": "{}"},
    )
    with pytest.raises(ValueError, match="version 9"):
        load(tmp_path / "new.safetensors")


def test_parts_of_the_data_make_the_whole(tmp_path):  # S11
    options = {**OPTIONS, "labels": "exact"}
    whole = collect(model(), data(), **options)
    parts = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for part, batches in zip(parts, (data()[:1], data()[1:4], data()[4:]), strict=True):
        collect(model(), batches, out=part, **options)
    merged = merge_files(parts, tmp_path / "all")
    close(merged, whole)
    assert [entry["batches"] for entry in merged.header["data"]] == [1, 3, 2]
    pairs = merge_files([merge_files(parts[:2], tmp_path / "ab").path, parts[2]], tmp_path / "abc")
    close(pairs, whole)


def test_parts_of_the_layers_make_the_whole(tmp_path):  # S11
    whole = collect(model(), data(), **OPTIONS)
    for name in ("0", "2", "3"):
        collect(
            model(), data(), out=tmp_path / name, layers=lambda n, own=name: n == own, **OPTIONS
        )
    merged = merge_files([tmp_path / name for name in ("0", "2", "3")], tmp_path / "all")
    assert sorted(merged.header["tensors"]) == sorted(whole.header["tensors"])
    for key in whole.header["tensors"]:
        assert torch.equal(merged._read(key), whole._read(key))
    assert len(merged.header["data"]) == 1


def test_what_does_not_add_is_refused(tmp_path):  # S11
    paths = {name: tmp_path / name for name in ("a", "same", "other", "labels")}
    collect(model(), data(), out=paths["a"], **OPTIONS)
    collect(model(), data(), out=paths["same"], **OPTIONS)
    collect(model(1), data(), out=paths["other"], **OPTIONS)
    collect(model(), data()[:1], out=paths["labels"], **{**OPTIONS, "labels": "exact"})
    with pytest.raises(ValueError, match="of the same data is in more than one"):
        merge_files([paths["a"], paths["same"]], tmp_path / "out")
    with pytest.raises(ValueError, match="fingerprints differ"):
        merge_files([paths["a"], paths["other"]], tmp_path / "out")
    with pytest.raises(ValueError, match="labels='exact' where"):
        merge_files([paths["a"], paths["labels"]], tmp_path / "out")
    with pytest.raises(ValueError, match="inputs is empty"):
        merge_files([], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    twice = merge_files([paths["a"], paths["same"]], tmp_path / "out", allow_repeats=True)
    assert twice.counts("0").tokens == 36


def test_data_count_as_often_as_they_are_added(tmp_path):  # S11
    for name, batches, layers in (
        ("0", data()[:2], "0"),
        ("2", data()[:2], "2"),
        ("r", data()[2:], "0"),
    ):
        collect(
            model(), batches, out=tmp_path / name, layers=lambda n, own=layers: n == own, **OPTIONS
        )

    def merged(out, *names, repeats=False):
        found = merge_files([tmp_path / n for n in names], tmp_path / out, allow_repeats=repeats)
        return [entry["batches"] for entry in found.header["data"]]

    assert merged("00", "0", "0", repeats=True) == [2, 2]
    assert merged("000", "00", "0", repeats=True) == [2, 2, 2]
    assert merged("02", "0", "2") == [2]  # parts of the layers
    assert merged("0202", "02", "02", "2", repeats=True) == [2, 2, 2]
    # What was once allowed to repeat in a file is no repeat between that file and another one.
    assert merged("00r", "00", "r") == [2, 2, 4]
    assert merged("copy", "00") == [2, 2]
    assert load(tmp_path / "00r").counts("0").examples == sum(
        entry["examples"] for entry in load(tmp_path / "00r").header["data"]
    )


class Branches(nn.Module):
    """Two layers that read one input, or equal but separate ones."""

    def __init__(self, separate: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3)
        self.separate = separate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x.clone() if self.separate else x)


def test_aliases_merge_with_separate_sums(tmp_path):  # S11
    batches = [torch.randn(3, 4), torch.randn(2, 4)]
    shared = collect(Branches(False), batches[:1], kinds=("input_gram",), out=tmp_path / "shared")
    separate = collect(
        Branches(True), batches[1:], kinds=("input_gram",), out=tmp_path / "separate"
    )
    collect(Branches(False), batches[1:], kinds=("input_gram",), out=tmp_path / "again")
    assert shared.shares_input("k") == "q"
    assert separate.shares_input("k") == "k"
    mixed = merge_files([tmp_path / "shared", tmp_path / "separate"], tmp_path / "mixed")
    alike = merge_files([tmp_path / "shared", tmp_path / "again"], tmp_path / "alike")
    assert mixed.shares_input("k") == "k"
    assert alike.shares_input("k") == "q"
    x = torch.cat(batches)
    for stats in (mixed, alike):
        torch.testing.assert_close(stats.input_gram("k", mean=False), x.T @ x)
        torch.testing.assert_close(stats.input_gram("q", mean=False), x.T @ x)
        assert stats.counts("k").tokens == 5
    forced = collect(Branches(False), batches, kinds=("input_gram",), share_inputs=False)
    assert forced.shares_input("k") == "k"


def test_sharing_that_ends_is_an_error():  # S3
    branches = Branches(False)

    def batches():
        yield torch.randn(3, 4)
        branches.separate = True
        yield torch.randn(3, 4)

    with pytest.raises(RuntimeError, match="share_inputs=False"):
        collect(branches, batches(), kinds=("input_gram",))


class Killed(Exception):
    pass


def killed_after(steps: int):
    seen = []

    def progress(state: Progress) -> None:
        seen.append(state)
        if len(seen) == steps:
            raise Killed

    return progress


@pytest.mark.parametrize(
    ("limit", "steps"), [(None, 1), (None, 2), (None, 5), (8 * 60, 1), (8 * 60, 8), (8 * 60, 13)]
)
def test_an_interrupted_run_goes_on(tmp_path, limit, steps):  # S13
    whole = collect(model(), data(), **OPTIONS)
    out = tmp_path / "s.safetensors"
    options = {**OPTIONS, "memory_limit": limit, "out": out, "checkpoint_every": 2}
    with pytest.raises(Killed):
        collect(model(), data(), progress=killed_after(steps), **options)
    assert not out.exists()
    folder = tmp_path / "s.safetensors.parts"
    parts = sorted(folder.glob("*")) if folder.exists() else []
    for part in parts:
        assert load(part).header["data"][0]["batches"] in (2, 4, 6)
    if parts:
        with pytest.raises(ValueError, match="resume=True"):
            collect(model(), data(), **options)
    states = []
    resumed = collect(model(), data(), resume=True, progress=states.append, **options)
    close(resumed, whole)
    assert resumed.header["data"] == whole.header["data"]
    assert "progress" not in resumed.header
    total = 6 * states[0].passes
    assert len(states) == total - (steps // 6 * 6 + steps % 6 // 2 * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("limit", [None, 8 * 60])
def test_two_runs_into_one_file(tmp_path, limit, resume):  # S13
    """The second neither goes on from the first one's parts nor deletes them."""
    out = tmp_path / "s.safetensors"
    options = {**OPTIONS, "memory_limit": limit, "out": out, "checkpoint_every": 2}
    refused = []

    def second(state):
        with pytest.raises(OutputError, match="another run is collecting"):
            collect(model(), data(), resume=resume, progress=pytest.fail, **options)
        refused.append(state)

    close(collect(model(), data(), progress=second, **options), collect(model(), data(), **OPTIONS))
    assert len(refused) >= 6
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_run_that_ends_before_its_first_part_leaves_nothing(tmp_path):  # S13
    options = {**OPTIONS, "out": tmp_path / "s.safetensors", "checkpoint_every": 2}
    with pytest.raises(Killed):
        collect(model(), data(), progress=killed_after(1), **options)
    assert not list(tmp_path.iterdir())


def test_resuming_something_else_is_refused(tmp_path):  # S13
    out = tmp_path / "s.safetensors"
    options = {**OPTIONS, "out": out, "checkpoint_every": 1}
    with pytest.raises(Killed):
        collect(model(), data(), progress=killed_after(3), **options)
    with pytest.raises(ValueError, match="another model"):
        collect(model(1), data(), resume=True, **options)
    with pytest.raises(ValueError, match="another settings"):
        collect(model(), data(), resume=True, labels="exact", **options)
    with pytest.raises(ValueError, match="seed=0"):
        collect(model(), data(), resume=True, seed=4, **options)
    with pytest.raises(ValueError, match="not what the interrupted run had read"):
        collect(model(), [x + 1 for x in data()], resume=True, **options)
    with pytest.raises(ValueError, match="fewer batches"):
        collect(model(), data()[:1], resume=True, **options)
    close(collect(model(), data(), resume=True, **options), collect(model(), data(), **OPTIONS))


@pytest.mark.parametrize("options", [{"checkpoint_every": 1}, {}], ids=["unfinished", "finished"])
def test_no_part_of_another_seed_is_resumed(tmp_path, options):  # S13
    options = {**OPTIONS, "memory_limit": 8 * 60, "out": tmp_path / "s", **options}
    with pytest.raises(Killed):
        collect(model(), data(), progress=killed_after(8), **options)
    with pytest.raises(ValueError, match="seed=0"):
        collect(model(), data(), resume=True, seed=4, **options)
    close(collect(model(), data(), resume=True, **options), collect(model(), data(), **OPTIONS))


def test_an_unfinished_part_is_a_statistics_file(
    tmp_path,
):  # S13: nothing is lost without resuming either
    out = tmp_path / "s.safetensors"
    with pytest.raises(Killed):
        collect(
            model(),
            data(),
            progress=killed_after(3),
            out=out,
            checkpoint_every=2,
            **{**OPTIONS, "labels": "exact"},
        )
    (part,) = (tmp_path / "s.safetensors.parts").iterdir()
    rest = collect(model(), data()[2:], out=tmp_path / "rest", **{**OPTIONS, "labels": "exact"})
    assert rest.counts("0").tokens == 12
    merged = merge_files([part, tmp_path / "rest"], tmp_path / "all")
    close(merged, collect(model(), data(), **{**OPTIONS, "labels": "exact"}))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):  # S13
    out = tmp_path / "s.safetensors"
    collect(model(), data(), out=out, **OPTIONS)
    before = out.read_bytes()
    monkeypatch.setattr(
        "pymerge.statistics._file._write_tensor",
        lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")),
    )
    with pytest.raises(DiskFullError, match=r"s\.safetensors: no room left .*disk full"):
        collect(model(), data(), out=out, overwrite=True, **OPTIONS)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_file_that_exists_is_not_replaced_unasked(tmp_path):  # S13
    out = tmp_path / "s.safetensors"
    stats = collect(model(), data(), out=out, **OPTIONS)
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match=r"pass overwrite=True to replace it"):
        collect(model(1), data(), out=out, **OPTIONS)
    with pytest.raises(FileExistsError, match=r"pass overwrite=True to replace it"):
        merge_files([out], out)
    assert out.read_bytes() == before
    stats.save(out)  # as saving does everywhere
    assert merge_files([out], out, overwrite=True).layers == stats.layers
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    for attempt in (
        lambda: collect(model(), data(), out=notes, overwrite=True, **OPTIONS),
        lambda: merge_files([out], notes, overwrite=True),
        lambda: stats.save(notes),
    ):
        with pytest.raises(FileExistsError, match="is not a statistics file; it is never replaced"):
            attempt()
    assert notes.read_text() == "mine"


def test_a_file_that_cannot_be_read_is_not_said_to_be_no_statistics(tmp_path, monkeypatch):
    out = tmp_path / "s.safetensors"
    collect(model(), data(), out=out, **OPTIONS)
    may = os.access
    monkeypatch.setattr(os, "access", lambda at, mode, **how: at != out and may(at, mode, **how))
    with pytest.raises(FileExistsError, match=r"exists and cannot be read.*never replaced"):
        collect(model(), data(), out=out, overwrite=True, **OPTIONS)


@pytest.mark.parametrize("limit", [None, 500])  # one pass; several
def test_a_file_that_appears_meanwhile_is_kept_and_so_is_the_work(tmp_path, limit):  # S13
    out = tmp_path / "s.safetensors"

    def appear(state):
        out.write_text("of another process")

    with pytest.raises(FileExistsError, match="is left as it is; this result is") as error:
        collect(model(), data(), out=out, memory_limit=limit, progress=appear, **OPTIONS)
    assert out.read_text() == "of another process"
    close(load(str(error.value).rpartition(" is ")[2]), collect(model(), data(), **OPTIONS))


def test_what_lies_at_the_temporary_name_is_not_written_to(tmp_path, monkeypatch):
    """A link that somebody planted there."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda _: "00")
    (tmp_path / ".s.safetensors.00.part").symlink_to(precious)
    stats = collect(model(), data(), kinds=("input_gram",))
    with pytest.raises(OutputError, match="File exists"):
        stats.save(tmp_path / "s.safetensors")
    assert precious.read_text() == "mine"
