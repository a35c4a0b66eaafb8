"""`wudi`, `tsv` and `iso_c` (docs/spec/matrix.md): the fast path against the reference, both against
direct formulas and the papers' algorithms, and what the rules promise.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import adapter, with_update, write_adapter
from folder_cases import SHAPES, assert_same, family, read_result, write_model
from mats_cases import relative

import pymerge
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import NonFiniteError
from pymerge.reference import matrix as reference
from pymerge.rules.matrix import MatrixOptions, share_of

METHODS = ("wudi", "tsv", "iso_c")
LINEAR = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight")


def tasks(shape, count, seed=0, dtype=torch.float64, size=0.01):
    """(models, base), with differences of full rank."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    models = [
        base + size * torch.randn(shape, generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]
    return [model.to(dtype) for model in models], base.to(dtype)


def low_rank(shape, count, rank, seed=0, size=0.01):
    """Task vectors of a rank, as exact products."""
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = shape
    return [
        size
        * torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
        @ torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]


def deltas(models, base):
    return [model.double() - base.double() for model in models]


def merged(method, models, base, **options):
    """T of the fast path."""
    return getattr(pymerge, method)(models, base, **options).double() - base.double()


# The fast path and the reference.


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40), (1, 30), (30, 1), (3, 4)])
@pytest.mark.parametrize("method", METHODS)
def test_reference(method, shape, count):
    models, base = tasks(shape, count)
    want = merged(method, models, base, backend="reference")
    assert relative(merged(method, models, base), want) < 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_round_once(method, dtype):
    """X1: the output is that of the reference but where T is on the border of two values; in `wudi`
    the solver's T has the rounding of its precision.
    """
    models, base = tasks((33, 20), 3, dtype=dtype, size=0.1)
    want = getattr(pymerge, method)(models, base, backend="reference")
    got = getattr(pymerge, method)(models, base)
    assert got.dtype == dtype
    if method == "wudi":
        assert relative(got, want) < {torch.float32: 1e-5}.get(dtype, 1e-3)
    else:
        assert float((got != want).double().mean()) < 0.02


def test_models_of_several_dtypes_and_scaling():
    models, base = tasks((20, 16), 2, size=0.25)
    mixed = [models[0].to(torch.bfloat16), models[1].float()]
    for method in METHODS:
        wide = [model.double() for model in mixed]
        got = getattr(pymerge, method)(mixed, base.float(), scaling=0.5)
        assert got.dtype == torch.float32
        want = getattr(reference, method)
        own = deltas(wide, base.float())
        levels = [reference.level(model) for model in mixed]
        t = {
            "wudi": lambda want=want, own=own: want(own, 5, 0.1),
            "tsv": lambda want=want, own=own, levels=levels: want(own, levels, 8),
            "iso_c": lambda want=want, own=own, levels=levels: want(own, levels),
        }[method]()
        assert relative(got.double() - base.float().double(), 0.5 * t) < 2e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_is_merged_matrix_by_matrix(method):
    """X2."""
    models, base = tasks((3, 20, 12), 2)
    name = "model.layers.0.mlp.experts.up_proj"
    stack = pymerge.merge([{name: m} for m in models], {name: base}, method=method)[name]
    for i in range(3):
        one = getattr(pymerge, method)([m[i] for m in models], base[i])
        assert torch.equal(stack[i], one)


# Direct formulas, and the papers' algorithms.


def objective(t, own):
    """X4 as it is written."""
    return sum(float(((t - d) @ d.T).norm() ** 2 / d.norm() ** 2) for d in own)


def normal_equations(own):
    total = sum(d.T @ d / d.norm() ** 2 for d in own)
    right = sum(d @ (d.T @ d) / d.norm() ** 2 for d in own)
    return right @ torch.linalg.pinv(total, hermitian=True)


@pytest.mark.parametrize(("shape", "count"), [((20, 64), 3), ((64, 20), 3), ((30, 30), 2)])
def test_wudi_goes_towards_the_minimiser(shape, count):
    """X4, X5."""
    models, base = tasks(shape, count)
    own = deltas(models, base)
    best = objective(normal_equations(own), own)
    start = objective(sum(own), own)
    found = []
    for iterations in (0, 1, 5, 400):
        reports = []
        t = merged("wudi", models, base, iterations=iterations, damping=0.01, reports=reports)
        [report] = reports
        found.append(objective(t, own))
        assert report.objective_start == pytest.approx(start, rel=1e-6)
        left = report.objective_start - report.objective_decrease
        assert left == pytest.approx(found[-1], rel=1e-5, abs=1e-9 * start)
        assert report.growth == pytest.approx(float(t.norm() / sum(own).norm()), rel=1e-6)
        assert report.name == ""
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(start, rel=1e-9)
    assert found[-1] - best < 2e-3 * start


def test_adam_of_the_paper_comes_to_the_same_objective():
    """X5: hundreds of steps of Adam, at a rate that suits the size of the weights, and the solver's
    few.
    """
    models, base = tasks((24, 32), 3)
    own = [d.requires_grad_(False) for d in deltas(models, base)]
    t = sum(own).clone().requires_grad_(True)
    adam = torch.optim.Adam([t], lr=1e-4)
    for _ in range(600):
        adam.zero_grad()
        loss = sum(((t - d) @ d.T).square().sum() / d.square().sum() for d in own)
        loss.backward()
        adam.step()
    by_adam = objective(t.detach(), own)
    by_solver = objective(merged("wudi", models, base, iterations=20, damping=0.01), own)
    start, best = objective(sum(own), own), objective(normal_equations(own), own)
    assert by_adam < best + 0.05 * (start - best)
    assert by_solver < best + 0.05 * (start - best)


def test_the_whole_solution_explodes_and_few_steps_do_not():
    """X5: K d_out = d_in."""
    models, base = tasks((96, 384), 4)
    own = deltas(models, base)
    whole = normal_equations(own)
    assert whole.norm() > 5 * sum(own).norm()
    assert objective(whole, own) < 1e-9 * objective(sum(own), own)
    with pytest.warns(UserWarning, match="grew to more than 2 times the norm of the sum"):
        t = merged("wudi", models, base)
    assert t.norm() < 4 * sum(own).norm()
    assert objective(t, own) < 0.1 * objective(sum(own), own)


def test_wudi_scales_with_the_weights():
    models, base = tasks((24, 32), 3, dtype=torch.float32)
    zero = torch.zeros_like(base)
    own = [model - base for model in models]
    small = pymerge.wudi([d * 2.0**-60 for d in own], zero)
    assert torch.equal(small, pymerge.wudi(own, zero) * 2.0**-60)


@pytest.mark.parametrize(("shape", "count"), [((40, 24), 3), ((24, 40), 4), ((32, 32), 2)])
def test_tsv_of_the_paper(shape, count):
    """X6, with whitening by singular vectors as in the official code."""
    models, base = tasks(shape, count)
    share = min(shape) // count
    parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas(models, base)]
    left = torch.cat([u[:, :share] for u, _, _ in parts], 1)
    right = torch.cat([vh[:share] for _, _, vh in parts], 0)
    values = torch.cat([s[:share] for _, s, _ in parts])
    a, _, b = torch.linalg.svd(left, full_matrices=False)
    c, _, d = torch.linalg.svd(right, full_matrices=False)
    want = a @ b @ torch.diag(values) @ c @ d
    assert relative(merged("tsv", models, base), want) < 1e-8


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_iso_c_of_the_paper(shape):
    """X7."""
    models, base = tasks(shape, 3)
    u, s, vh = torch.linalg.svd(sum(deltas(models, base)), full_matrices=False)
    got = merged("iso_c", models, base)
    assert relative(got, s.mean() * u @ vh) < 1e-9
    flat = torch.linalg.svdvals(got)
    assert flat.min() == pytest.approx(float(flat.max()), rel=1e-9)
    assert flat.sum() == pytest.approx(float(s.sum()), rel=1e-9)


# What the rules promise.


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(method, dtype):
    models, base = tasks((1400, 150), 3, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(getattr(pymerge, method)(models, base))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_orientation_and_order_do_not_matter(method):
    models, base = tasks((40, 24), 3)
    want = merged(method, models, base)
    assert relative(merged(method, [m.T for m in models], base.T).T, want) < 1e-9
    assert relative(merged(method, models[::-1], base), want) < 1e-9


def test_one_model_is_its_own_merge():
    models, base = tasks((40, 24), 1)
    assert relative(merged("tsv", models, base), models[0] - base) < 1e-9
    assert relative(merged("wudi", models, base), models[0] - base) < 1e-9


def test_a_model_given_twice_counts_once_in_tsv():
    """X6: dependent vectors have no directions of their own."""
    [model], base = tasks((40, 24), 1)
    u, s, vh = torch.linalg.svd(model - base, full_matrices=False)
    want = (u[:, :12] * s[:12]) @ vh[:12]
    got = merged("tsv", [model, model], base)
    assert relative(got, want) < 1e-6
    assert relative(merged("tsv", [model, model], base, backend="reference"), want) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_unchanged_models(method):
    """Models that are the base add nothing; all of them give the base."""
    models, base = tasks((20, 12), 2)
    assert torch.equal(getattr(pymerge, method)([base, base], base), base)
    with_base = merged(method, [*models, base], base)
    if method == "iso_c":
        assert torch.equal(with_base, merged(method, models, base))
    elif method == "wudi":
        assert relative(with_base, merged(method, models, base)) < 1e-12
    assert with_base.isfinite().all()


def test_rounding_of_the_weights_is_no_singular_value():
    """X3: of task vectors of rank 2, stored in fp32, the sum has rank 6."""
    shape, count, rank = (60, 40), 3, 2
    _, base = tasks(shape, 0)
    own = low_rank(shape, count, rank)
    stored = [(base.float().double() + d).float() for d in own]
    exact = torch.linalg.svdvals(sum(own))
    values = torch.linalg.svdvals(merged("iso_c", stored, base.float()))
    some = count * rank
    assert values[:some] == pytest.approx(float(exact[:some].mean()), rel=1e-3)
    assert values[some:].max() < 1e-4 * values[0]
    wide = [base + d for d in own]
    t = merged("tsv", wide, base)
    assert relative(merged("tsv", stored, base.float()), t) < 1e-3
    assert int((torch.linalg.svdvals(t) > 1e-9).sum()) == some


def test_what_is_above_a_thousandth_counts_though_it_be_rounding():
    """X3: bf16 models that differ by units in the last place keep their task vectors."""
    _, base = tasks((64, 48), 0)
    base = base.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    models = []
    for _ in range(2):
        steps = torch.randint(-1, 2, base.shape, generator=generator, dtype=torch.int16)
        models.append((base.view(torch.int16) + steps).view(torch.bfloat16))
    own = deltas(models, base)
    u, s, vh = torch.linalg.svd(sum(own), full_matrices=False)
    got = merged("iso_c", [m.double() for m in models], base.double())
    assert relative(got, s.mean() * u @ vh) < 1e-9
    narrow = merged("iso_c", models, base)
    assert narrow.norm() > 0.5 * got.norm()


@pytest.mark.parametrize("size", [1e-18, 1e15])
@pytest.mark.parametrize("method", METHODS)
def test_any_size(method, size):
    """Squares of task vectors are out of binary32's range; the merges are not."""
    models, base = tasks((24, 16), 2, dtype=torch.float32)
    zero = torch.zeros_like(base)
    own = [model - base for model in models]
    scaled = [d * size for d in own]
    want = getattr(pymerge, method)(own, zero).double()
    assert relative(getattr(pymerge, method)(scaled, zero).double() / size, want) < 1e-5


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (), (5,), (2, 3, 4), (0,)])
@pytest.mark.parametrize("method", METHODS)
def test_other_shapes_become_the_average(method, shape):
    """X2."""
    models, base = tasks(shape, 2, dtype=torch.float32)
    want = pymerge.ties(
        models, base, trim="none", elect="none", density=1.0, merge="weighted_mean", scaling=0.7
    )
    assert torch.equal(getattr(pymerge, method)(models, base, scaling=0.7), want)


@pytest.mark.parametrize("method", METHODS)
def test_which_tensors_are_matrices(method):
    """X2: embeddings, heads and norms are averaged, at the merge's own scaling."""
    base, *models = family(3, torch.float32)
    got = pymerge.merge(models, base, method=method, scaling=0.5)
    for name in SHAPES:
        own = getattr(pymerge, method)([m[name] for m in models], base[name], scaling=0.5)
        mean = pymerge.ties(
            [m[name] for m in models],
            base[name],
            trim="none",
            elect="none",
            density=1.0,
            merge="weighted_mean",
            scaling=0.5,
        )
        is_matrix = "layers" in name and len(SHAPES[name]) == 2
        assert torch.equal(got[name], own if is_matrix else mean), name
        assert not is_matrix or not torch.equal(own, mean)


def test_values_that_are_not_finite():
    """X8."""
    models, base = tasks((20, 12), 3, dtype=torch.float32)
    bad = [*models[:2], models[2].clone()]
    bad[2][3, 4] = math.nan
    for method, backend in itertools.product(METHODS, ("auto", "reference")):
        run = getattr(pymerge, method)
        with pytest.raises(NonFiniteError, match=r"models\[2\]"):
            run(bad, base, backend=backend)
        got = run(bad, base, non_finite="allow", backend=backend)
        if method == "tsv":  # the share stays that of three
            assert got.isfinite().all()
        else:
            assert torch.equal(got, run(models[:2], base, backend=backend))
        none = run([bad[2]] * 3, base, non_finite="allow", backend=backend)
        assert torch.equal(none, base)


def test_results_that_overflow_fp16():
    models = [torch.full((4, 6), 60000.0, dtype=torch.float16)] * 2
    base = torch.zeros(4, 6, dtype=torch.float16)
    with pytest.raises(NonFiniteError, match="overflow float16"):
        pymerge.iso_c(models, base)


def test_arguments():
    models, base = tasks((6, 4), 2, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"iterations: -1 is outside \[0, infinity\)"):
        pymerge.wudi(models, base, iterations=-1)
    with pytest.raises(ValueError, match=r"damping: -0\.5 is outside \[0, infinity\)"):
        pymerge.wudi(models, base, damping=-0.5)
    with pytest.raises(TypeError, match=r"tsv has no parameter 'iterations'; it has scaling"):
        pymerge.merge([{"a": m} for m in models], {"a": base}, method="tsv", iterations=3)
    with pytest.raises(TypeError, match="tsv has no parameter 'reports'"):
        pymerge.merge([{"a": m} for m in models], {"a": base}, method="tsv", reports=[])
    with pytest.raises(ValueError, match="base is missing; iso_c merges task vectors"):
        pymerge.merge([{"a": m} for m in models], method="iso_c")
    with pytest.raises(ValueError, match="backend='fast' is not one of 'auto', 'reference'"):
        pymerge.iso_c(models, base, backend="fast")
    assert torch.equal(pymerge.tsv(models, base, scaling=np.float32(1)), pymerge.tsv(models, base))
    out = torch.empty_like(base)
    assert pymerge.tsv(models, base, out=out) is out
    assert torch.equal(out, pymerge.tsv(models, base))
    assert base.equal(tasks((6, 4), 2, dtype=torch.float32)[1])


# Folders.


def config(method, folders, **parameters):
    return {
        "merge_method": method,
        "base_model": str(folders[0]),
        "models": [{"model": str(folder)} for folder in folders[1:]],
        "parameters": parameters,
    }


def written(root: Path, states):
    return [write_model(root / f"m{k}", state) for k, state in enumerate(states)]


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_models(tmp_path, method):
    """`base+adapter` is merged as the model that it is: to the bit as what it is written as, since a
    solver makes more of another rounding of B A.
    """
    base, _ = family(1, torch.float32)
    folders = written(tmp_path, [base])
    named, plain = [], []
    for k in range(2):
        named.append(f"{folders[0]}+{write_adapter(tmp_path / f'a{k}', adapter(k))}")
        alone = {"merge_method": "passthrough", "models": [{"model": named[k]}]}
        merge_checkpoints(alone, tmp_path / f"plain{k}")
        plain.append(read_result(tmp_path / f"plain{k}"))
        updated = with_update(base, adapter(k))
        for name, tensor in plain[k].items():
            torch.testing.assert_close(tensor, updated[name], rtol=1e-6, atol=1e-6)
    merge_checkpoints(config(method, [folders[0], *named]), tmp_path / "out")
    got, want = read_result(tmp_path / "out"), pymerge.merge(plain, base, method=method)
    assert sorted(got) == sorted(want)
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name]), name


def test_adapters_are_not_merged_into_an_adapter(tmp_path):
    base, _ = family(1, torch.float32)
    folders = written(tmp_path, [base])
    named = [write_adapter(tmp_path / f"a{k}", adapter(k)) for k in range(2)]
    setup = config("tsv", [folders[0], *(f"{folders[0]}+{each}" for each in named)])
    with pytest.raises(ValueError, match="tsv is not merged from the adapters' factors"):
        merge_checkpoints(setup, tmp_path / "out", rank=4)


def test_a_gradient_and_filters(tmp_path):
    states = family(2, torch.float32)
    folders = written(tmp_path, states)
    scaling = [{"filter": "q_proj", "value": 0.5}, {"value": 1.0}]
    merge_checkpoints(config("tsv", folders, **{"lambda": scaling}), tmp_path / "out")
    got = read_result(tmp_path / "out")
    base, *models = states
    for name, size in zip(LINEAR, (0.5, 1.0), strict=True):
        want = pymerge.tsv([m[name] for m in models], base[name], scaling=size)
        assert torch.equal(got[name], want)


def test_reports_of_a_folder(tmp_path):
    folders = written(tmp_path, family(2, torch.float32))
    summary = merge_checkpoints(config("wudi", folders, iterations=3), tmp_path / "out")
    assert {name: method.tensors for name, method in summary.methods.items()} == {
        "wudi": 4,
        "average": 5,
    }
    table = (tmp_path / "out" / "merge_report.txt").read_text().splitlines()
    assert table[0].split()[-4:] == ["objective", "of", "start", "growth"]
    assert len(table) == 5
    assert all(0 < float(line.split()[-2]) < 1 for line in table[1:])


def test_memory_in_the_plan(tmp_path):
    folders = written(tmp_path, family(3, torch.float32))
    for method in METHODS:
        options = MatrixOptions(method, 3)
        plan = plan_checkpoints(config(method, folders))
        most = max(options.memory(SHAPES[name]) for name in LINEAR)
        assert plan.memory == most > 0
        assert options.memory((7, 24, 16)) == options.memory((24, 16))


@pytest.mark.parametrize("method", METHODS)
def test_resumed_merges(tmp_path, method):
    """What a file held is in the report again, and the result is the same."""
    states = family(2, torch.float32)
    folders = written(tmp_path, states)
    setup = config(method, folders)
    merge_checkpoints(setup, tmp_path / "whole", out_shard_size=2000)

    def stop(done: int, total: int, name: str) -> None:
        if name.startswith("model.layers.1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(setup, tmp_path / "out", out_shard_size=2000, progress=stop)
    summary = merge_checkpoints(setup, tmp_path / "out", out_shard_size=2000, resume=True)
    assert summary.resumed > 0
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "whole"))
    if method == "wudi":
        reports = [(tmp_path / x / "merge_report.txt").read_text() for x in ("out", "whole")]
        assert reports[0] == reports[1]


def test_the_share_of_singular_vectors():
    assert [share_of((49, 60), k) for k in (1, 2, 4, 49, 50)] == [49, 24, 12, 1, 1]
