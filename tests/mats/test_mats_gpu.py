"""Conjugate gradient on a GPU against plain torch there: the vector updates of each backend, and its
runs on small layers (docs/spec/mats.md, M6 to M9).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mats_cases import case, relative

from pymerge.backends.cg.iteration import VectorUpdates, conjugate_gradient
from pymerge.backends.registry import small_kernel, vector_updates
from pymerge.ops.mats import small_layers
from pymerge.ops.mats.api import MatsLayer, mats_many
from pymerge.ops.mats.system import Operator, Preconditioner, build
from pymerge.rules.mats import resolve


@pytest.mark.parametrize("shape", [(1, 3, 25), (3, 7, 11), (2, 130, 127), (1, 2048, 2048)])
def test_vector_updates(on_gpu: str, shape: tuple[int, ...]) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    weight = torch.rand(shape, generator=g, device="cuda") + 0.5
    first = torch.randn(shape, generator=g, device="cuda")
    images: list[torch.Tensor] = []  # of the directions, as plain torch finds them

    def run(kind: type[VectorUpdates]) -> Any:
        enough = torch.zeros(shape[0], dtype=torch.float64, device="cuda")
        r = first.clone()
        running = kind(torch.zeros_like(first), r, r, 0.0, None, enough)
        for i in range(4):
            if len(images) == i:
                images.append(running.p * weight)
            running.advance(images[i])
            running.turn(r)
        return running

    want, got = run(VectorUpdates), run(vector_updates("cuda", on_gpu))
    for vector in ("step", "r", "p"):  # r and p vanish: what counts is their first size
        there, here = (getattr(x, vector) + first for x in (got, want))
        assert relative(there, here) < 1e-5, vector
    assert torch.equal(got.state().iterations, want.state().iterations)


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 64, 64), (3, 2, 40), (1, 1, 256), (64, 16, 256), (64, 256, 256)])  # fmt: skip
def test_small_layers(on_gpu: str, shape: tuple[int, int, int]) -> None:
    layers, d_out, d_in = shape
    kernel = small_kernel("cuda", on_gpu)
    assert kernel is not None
    g = torch.Generator("cuda").manual_seed(sum(shape))

    def grams(d: int) -> list[torch.Tensor]:
        rows = [torch.randn(4, 3 * d, d, generator=g, device="cuda") for _ in range(layers)]
        return [x.mT @ x / (3 * d) for x in rows]

    rule = resolve(4, objective_tolerance=0.0)
    system = build(grams(d_in), grams(d_out) if d_out > 1 else None, rule, torch.float32, layers)
    inverses = Preconditioner(system, rule, rule.damping)
    rest = torch.randn(shape, generator=g, device="cuda")
    none = torch.zeros(layers, dtype=torch.float64, device="cuda")
    steps = torch.zeros_like(rest), torch.zeros_like(rest)
    got = small_layers.solve(
        kernel, system, inverses, steps[0], rest.clone(), 0.0, rule.iterations, None, none
    )
    apply = Operator(system, d_out, "fp32")
    want = conjugate_gradient(
        apply, inverses, steps[1], rest.clone(), rule, rule.iterations, None, none, VectorUpdates
    )
    assert relative(got.step, want.step) < 1e-5
    assert torch.equal(got.iterations, want.iterations)


def test_layers_by_the_public_function(on_gpu: str) -> None:
    c = case(3, 70, 50, dtype=torch.float32)
    here = MatsLayer(c.weights, c.a, c.b)
    there = MatsLayer(*([x.cuda() for x in xs] for xs in (c.weights, c.a, c.b)))
    (want,), (got,) = mats_many([here], backend="reference"), mats_many([there], backend=on_gpu)
    assert got.weight.device.type == "cuda"
    assert relative(got.weight.cpu(), want.weight) < 1e-5
