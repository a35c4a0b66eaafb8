"""Both doors of the analysis, the report, and the way by a merge."""

from __future__ import annotations

import html.parser
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from folder_cases import family, merge_in, write_family
from safetensors.torch import load_file, save_file
from solve_cases import recipe as solve_recipe
from solve_cases import write_statistics

import pymerge
from pymerge.analysis.folders import AnalysisObserver, _analyze
from pymerge.cli.main import commands
from pymerge.engine.sizes import Sizes
from pymerge.errors import MergeError, OutputError

TINY = Sizes(ahead=4096, ring=4096, piece=512, block=512, blocks=4)


def config(folders, method="ties", **parameters):
    made = {
        "merge_method": method,
        "models": [
            {"model": str(folder), "parameters": {"weight": 1.0 - 0.2 * k}}
            for k, folder in enumerate(folders[1:])
        ],
        "parameters": parameters,
    }
    if method not in ("linear", "karcher"):
        made["base_model"] = str(folders[0])
    return made


def named(analysis, models, base="base"):
    """Plain data, with these names of the models."""
    made = analysis.to_dict()
    return {**made, "models": models, "base": base}


def assert_same(found, wanted, where=""):
    """Numbers to rounding, all else as it is; named groups in any order."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for name in wanted:
            assert_same(found[name], wanted[name], f"{where}.{name}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        if wanted and isinstance(wanted[0], dict):
            found, wanted = (sorted(each, key=lambda x: x["name"]) for each in (found, wanted))
        for place, pair in enumerate(zip(found, wanted, strict=True)):
            assert_same(*pair, f"{where}[{place}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-7), where
    else:
        assert found == wanted, where


METHODS = {
    "ties": {"density": 0.3},
    "task_arithmetic": {},
    "dare_ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "della": {"density": 0.5, "epsilon": 0.1},
    "linear": {},
    "slerp": {"t": 0.4},
    "sce": {"select_topk": 0.5},
    "karcher": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_both_doors_and_a_merge_give_the_same_figures(method, tmp_path):
    given = METHODS[method]
    count = 1 if method == "slerp" else 3
    folders = write_family(tmp_path, count)
    base, *models = family(count)
    recipe = config(folders, method, **given)
    weights = [1.0 - 0.2 * k for k in range(count)]
    if method in ("slerp", "karcher", "sce"):
        for entry in recipe["models"]:
            del entry["parameters"]
        if method == "slerp":
            recipe["models"].insert(0, {"model": str(folders[0])})
        own = dict(given)
    else:
        own = {**given, "weight": weights}
    by_folders = pymerge.analyze_checkpoints(recipe)
    start = None if method in ("linear", "karcher") else base
    by_dicts = pymerge.analyze(models, start, method=method, **own)
    names = [str(k) for k in range(len(by_folders.models))]
    wanted = named(by_folders, names)
    assert_same(named(by_dicts, names), wanted)
    observer = AnalysisObserver()
    merge_in(TINY, recipe, tmp_path / "out", observer=observer)
    assert_same(named(observer.analysis, names), wanted)
    plain = tmp_path / "plain"
    pymerge.merge_checkpoints(recipe, plain)
    merged, other = (load_file(at / "model.safetensors") for at in (tmp_path / "out", plain))
    assert all(torch.equal(merged[name], other[name]) for name in other)
    total = by_folders.total
    shares = [x for x in total.contributions if x == x]
    if method not in ("slerp", "sce", "karcher"):  # what is not in the span of the task vectors
        assert sum(shares) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("flavor", ["mergekit", "paper"])
def test_thresholds_over_the_whole_model(flavor, tmp_path):
    folders = write_family(tmp_path, 3)
    base, *models = family(3)
    by_dicts = pymerge.analyze(models, base, density=0.3, flavor=flavor, scope="model")
    recipe = config(folders, density=0.3, flavor="paper")
    for entry in recipe["models"]:
        del entry["parameters"]
        entry["parameters"] = {"weight": 1.0}
    names = ["1", "2", "3"]
    if flavor == "paper":
        by_folders = _analyze(recipe, by_dicts.densities, 0, False, 1, None, TINY)
        assert_same(named(by_dicts, names), named(by_folders, names))
    total = by_dicts.total
    assert all(kept >= int(0.3 * total.elements) for kept in total["kept"].tolist())
    assert len({round(t.figures.kept_shares[0], 3) for t in by_dicts.tensors}) > 1


def test_layers_kinds_and_tensors_add_up(tmp_path):
    base, *models = family(2)
    analysis = pymerge.analyze(models, base, density=0.3)
    total = analysis.total
    assert total.elements == sum(x.numel() for x in base.values())
    for groups in (analysis.kinds.values(), [t.figures for t in analysis.tensors]):
        for name in ("kept", "signs", "both_kept", "agreed"):
            assert sum(each[name] for each in groups).equal(total[name])
    assert [*analysis.layers] == ["model.layers.0", "model.layers.1"]
    assert "self_attn.q_proj" in analysis.kinds
    assert analysis.kinds["self_attn.q_proj"].tensors == 2


def test_statistics_give_the_alignment(tmp_path):
    folders = write_family(tmp_path, 2, torch.float32)
    states = family(2, torch.float32)
    files = [
        write_statistics(tmp_path / f"{k}.safetensors", states[k], k, kinds=("input_gram",))
        for k in (1, 2)
    ]
    recipe = solve_recipe("mats", folders[1:], files, base=folders[0])
    analysis = pymerge.analyze_checkpoints(recipe)
    by_dicts = pymerge.analyze(states[1:], states[0], method="task_arithmetic", statistics=files)
    for found in (analysis, by_dicts):
        alignment = found.total.alignment
        assert all(0 < value < 10 for row in alignment for value in row)
        assert {t.kind for t in found.tensors if t.figures.alignment is not None} == {
            "self_attn.q_proj",
            "mlp.up_proj",
        }
    assert analysis.base == folders[0].name
    for name in ("alignment", "cosines", "norms", "kept"):
        assert_same(analysis.total.to_dict()[name], by_dicts.total.to_dict()[name])
    observer = AnalysisObserver()
    pymerge.merge_checkpoints(recipe, tmp_path / "out", observer=observer)
    assert_same(observer.analysis.to_dict(), analysis.to_dict())


def test_a_resumed_merge_is_analysed_as_a_whole(tmp_path):
    folders = write_family(tmp_path, 2)
    recipe = config(folders, density=0.3)
    wanted = pymerge.analyze_checkpoints(recipe).to_dict()

    class Stop(Exception):
        pass

    def stop(done, total, tensor):
        if done > total / 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pymerge.merge_checkpoints(recipe, out, out_shard_size="3KB", progress=stop)
    observer = AnalysisObserver()
    summary = pymerge.merge_checkpoints(
        recipe, out, out_shard_size="3KB", resume=True, observer=observer
    )
    assert summary.resumed > 0
    assert_same(observer.analysis.to_dict(), wanted)


class Page(html.parser.HTMLParser):
    """The tags of a page, those that are not closed, and what a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.fetched, self.text = [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.fetched += [v for n, v in attributes if n in ("src", "href", "data", "srcset")]
        self.fetched += [n for n, _ in attributes if n.startswith("on")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.fetched += [v for n, v in attributes if n in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\udcff]]>"


def test_the_report_takes_names_for_text_and_fetches_nothing(tmp_path):
    base, *models = family(2)
    named_so = f'model.layers.0.<img src=x onerror="alert(1)">.{HOSTILE}.weight'
    for state in (base, *models):
        state[named_so] = torch.randn(4, 4).bfloat16()
    analysis = pymerge.analyze(models, base, density=0.3)
    analysis.models = (HOSTILE, "b" * 300)
    analysis.base = HOSTILE
    page, data = analysis.write(tmp_path / "report.html")
    content = page.read_text(encoding="utf-8")
    for text in (content, analysis._repr_html_()):
        parsed = Page(text)
        assert not parsed.fetched and not parsed.open
        assert not parsed.tags & {"script", "img", "link", "iframe", "object"}
        assert "url(" not in text and "@import" not in text
        assert any("<script>alert(1)" in each for each in parsed.text)
    assert "prefers-color-scheme:dark" in content
    assert json.loads(data.read_text())["models"][0] == HOSTILE


@pytest.mark.parametrize("count", [1, 12])
def test_reports_of_few_and_many_models(count):
    base, *models = family(count)
    analysis = pymerge.analyze(models, base, density=0.3)
    parsed = Page(analysis.to_html())
    assert not parsed.open and "svg" in parsed.tags
    assert "nan" not in "".join(parsed.text).lower()


def test_nothing_to_merge(tmp_path):
    folders = write_family(tmp_path, 1)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folders[0])}]}
    analysis = pymerge.analyze_checkpoints(recipe)
    assert analysis.tensors == []
    assert "Nothing is merged" in analysis.to_html()
    assert json.dumps(analysis.to_dict(), allow_nan=False)


def test_json_has_no_nan():
    base, *models = family(2)
    models[0] = dict(base)
    text = json.dumps(pymerge.analyze(models, base).to_dict(), allow_nan=False)
    assert json.loads(text)["total"]["cosines"][0][1] is None


def test_a_summary_shows_itself(tmp_path):
    summary = pymerge.merge_checkpoints(config(write_family(tmp_path)), tmp_path / "<b>out")
    summary.notes = (HOSTILE,)
    parsed = Page(summary._repr_html_())
    assert not parsed.open and "script" not in parsed.tags and "ties" in parsed.text
    assert any(text.endswith("<b>out") for text in parsed.text)


def run(*words):
    return CliRunner().invoke(commands, [str(word) for word in words])


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(config(write_family(tmp_path), density=0.3)))
    return path


def test_the_command(recipe, tmp_path):
    result = run("analyze", recipe, tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    assert "contribution" in result.output and "signs conflict in" in result.output
    assert "report.html" in result.output and "report.json" in result.output
    found = json.loads((tmp_path / "report.json").read_text())
    assert_same(found, pymerge.analyze_checkpoints(str(recipe)).to_dict())
    quiet = run("analyze", recipe, "--quiet")
    assert quiet.exit_code == 0 and quiet.output == ""


def test_a_merge_with_a_report(recipe, tmp_path):
    result = run("merge", recipe, tmp_path / "out", "--report", tmp_path / "on the way.html")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "on the way.json").read_text())
    assert_same(found, pymerge.analyze_checkpoints(str(recipe)).to_dict())
    assert run("merge", recipe, tmp_path / "out", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    "words, match",
    [
        (["analyze", "RECIPE", "a.json"], "pass a .html"),
        (["merge", "RECIPE", "OUT", "--report", "a.json"], "pass a .html"),
        (["merge", "RECIPE", "OUT", "--report", "a.html", "--rank", "exact"], "--rank is given"),
    ],
)
def test_wrong_usage(recipe, tmp_path, words, match):
    known = {"RECIPE": recipe, "OUT": tmp_path / "out"}
    result = run(*(known.get(word, word) for word in words))
    assert result.exit_code == 2 and match in result.output


def test_a_report_that_cannot_be_written_is_told_before_the_work(recipe, tmp_path):
    report = recipe / "report.html"  # in what is no folder
    for words in (
        ["analyze", recipe, report],
        ["merge", recipe, tmp_path / "out", "--report", report],
    ):
        result = run(*words)
        assert result.exit_code == 1 and str(report) in result.output
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError):
        pymerge.analyze_checkpoints(str(recipe), report)


def somebodys(kind, path, tmp_path):
    """What lies there, of somebody else; returns how to look at it."""
    other = tmp_path / "other"
    other.write_text('{\n "version": "1.0", "mine": 1}')
    if kind == "file":
        other.rename(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    return lambda: (path.lstat(), path.read_text() if kind in ("file", "link") else None)


@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "link", "dangling link"])
@pytest.mark.parametrize("name", ["config.html", "config.json"])
def test_a_report_replaces_nothing_but_a_report(name, kind, recipe, tmp_path):
    look = somebodys(kind, tmp_path / name, tmp_path)
    before = look()
    report = tmp_path / "config.html"
    for words in (
        ["analyze", recipe, report],
        ["merge", recipe, tmp_path / "out", "--report", report],
    ):
        result = run(*words)
        said = f"{name} is a folder" if kind == "folder" else f"{name} exists and holds no"
        assert result.exit_code == 1 and said in result.output
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match=r"give another name|give the name of a file"):
        pymerge.analyze_checkpoints(str(recipe), report)
    with pytest.raises(OutputError, match=r"give another name|give the name of a file"):
        pymerge.analyze_checkpoints(str(recipe)).write(report)
    assert look() == before


@pytest.mark.parametrize("command", ["analyze", "merge"])
def test_a_report_tells_of_no_folders(recipe, tmp_path, command):
    report = tmp_path / "report.html"
    words = {"analyze": [report], "merge": [tmp_path / "out", "--report", report]}[command]
    assert run(command, recipe, *words).exit_code == 0
    found = json.loads(report.with_suffix(".json").read_text())
    assert found["base"] == "base" and "m1" in str(found["models"])
    for path in (report, report.with_suffix(".json")):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(
    "name, kept",
    [
        ("recipe.yml", "recipe.yml"),
        ("base/model.safetensors", "base/model.safetensors"),
        ("base/config.html", "base/config.json"),  # whose figures would replace it
        ("notes", "notes"),
        ("base", None),
        ("", None),
        ("..", None),
        ("out", None),  # the merged model's own folder
        ("out.html", None),  # a folder where the figures go
    ],
)
def test_a_report_is_no_file_of_a_recipe_a_model_or_the_result(
    recipe, tmp_path, monkeypatch, name, kept
):
    monkeypatch.chdir(tmp_path)
    Path("notes").symlink_to(recipe)
    Path("out.json").mkdir()
    before = None if kept is None else Path(kept).read_bytes()
    commands = [["merge", recipe, "out", "--report", name]]
    if name != "out":
        commands.append(["analyze", recipe, name])
        with pytest.raises(OutputError):
            pymerge.analyze_checkpoints(str(recipe), name)
    for words in commands:
        result = run(*words)
        assert result.exit_code == 1
        assert any(way_out in result.output for way_out in ("give", "name another"))
    assert not Path("out").exists()
    assert before is None or Path(kept).read_bytes() == before


def test_a_report_of_the_result_does_not_replace_its_files(recipe, tmp_path):
    out = tmp_path / "out"
    result = run("merge", recipe, out, "--report", out / "config.html")
    assert result.exit_code == 1 and "config.json exists and holds no figures" in result.output
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"


def test_a_report_is_replaced_by_the_next_one(recipe, tmp_path):
    report = tmp_path / "r.html"
    made = []
    for words in (["analyze", recipe, report], ["merge", recipe, tmp_path / "o", "--report"]):
        assert run(*words, *([report] if words[-1] == "--report" else [])).exit_code == 0
        made.append((report.stat().st_ino, (tmp_path / "r.json").stat().st_ino))
    assert made[0][0] != made[1][0] and made[0][1] != made[1][1]


def test_what_is_refused():
    base, *models = family(2)
    with pytest.raises(ValueError, match="outside"):
        pymerge.analyze(models, base, densities=[20])
    with pytest.raises(TypeError, match="a list of numbers"):
        pymerge.analyze(models, base, densities=0.2)
    with pytest.raises(ValueError, match="statistics has 1 entry for 2 models"):
        pymerge.analyze(models, base, statistics=[None])
    with pytest.raises(ValueError, match="merges by statistics"):
        pymerge.analyze(models, base, method="mats")
    with pytest.raises(MergeError):
        pymerge.analyze([models[0], {"other": torch.ones(3)}], base)


def test_what_is_no_observer(recipe, tmp_path):
    with pytest.raises(TypeError, match=r"pass pymerge\.AnalysisObserver"):
        pymerge.merge_checkpoints(str(recipe), tmp_path / "out", observer="report.html")
    assert not (tmp_path / "out").exists()


def test_modules_and_models_that_are_not_finite(tmp_path):
    base, *models = family(2)
    models[0]["model.norm.weight"][1] = float("nan")
    analysis = pymerge.analyze(models, base, density=0.3)
    assert analysis.total["non_finite"].tolist() == [1, 0]
    assert "not finite" in analysis.to_html()
    layer = torch.nn.Linear(3, 2)
    assert pymerge.analyze([layer, torch.nn.Linear(3, 2)], layer).total.elements == 8


def test_memory_does_not_hold_the_models(tmp_path):
    """A tensor that is cut into parts, and one that is not, in files."""
    base = {"a.weight": torch.zeros(64, 64), "b.weight": torch.zeros(700)}
    for name, step in (("base", 0.0), ("m1", 1.0), ("m2", -2.0)):
        folder = tmp_path / name
        folder.mkdir()
        state = {n: x + step * torch.arange(x.numel()).reshape(x.shape) for n, x in base.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text("{}")
    folders = [tmp_path / name for name in ("base", "m1", "m2")]
    recipe = config(folders, "task_arithmetic")
    found = _analyze(recipe, (0.5,), 0, False, 1, None, TINY)
    assert found.total.cosines[0][1] == pytest.approx(-1)
    assert found.total.conflicts[2] == found.total.elements - 2  # but for the two zeros
