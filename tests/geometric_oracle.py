"""The methods of docs/spec/gram.md (G6 to G10) on whole tensors in float64, with no Gram matrix: as
their authors write them.
"""

from __future__ import annotations

import math

import torch


def norm(x):
    return float(x.norm())


def between(a, b, t):
    """slerp, as mended."""
    a, b = a.double(), b.double()
    if norm(a) == 0 or norm(b) == 0:
        return (1 - t) * a + t * b
    cosine = max(-1.0, min(1.0, float((a / norm(a) * (b / norm(b))).sum())))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def slerp(models, base, t):
    return between(models[0], models[1], t)


def nuslerp(models, base, weights, per="tensor"):
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    start = torch.zeros_like(models[0]).double() if base is None else base.double()
    a, b = (model.double() - start for model in models)
    if per == "tensor" or a.ndim < 2:
        return start + between(a, b, t)
    first = a.flatten(1) if per == "column" else a.flatten(0, -2)
    second = b.flatten(1) if per == "column" else b.flatten(0, -2)
    dim = 1 if per == "column" else 0
    groups = [between(x, y, t) for x, y in zip(first.unbind(dim), second.unbind(dim), strict=True)]
    return start + torch.stack(groups, dim).reshape(a.shape)


def multislerp(models, base, weights, normalize=True, eps=1e-8):
    start = torch.zeros_like(models[0]).double() if base is None else base.double()
    deltas = [model.double() - start for model in models]
    if len(deltas) == 1:
        return start + deltas[0]
    w = [each / sum(weights) for each in weights] if normalize else weights
    units = [d / (norm(d) + eps) for d in deltas]
    mean = sum(x * u for x, u in zip(w, units, strict=True))
    if norm(mean) < max(eps, 1e-5 * sum(map(abs, w))):
        return start + sum(x * d for x, d in zip(w, deltas, strict=True))
    mean = mean / norm(mean)
    tangent = sum(x * (u - (u * mean).sum() * mean) for x, u in zip(w, units, strict=True))
    size = norm(tangent) + eps
    point = mean * math.cos(size) + tangent * (math.sin(size) / size)
    return start + point * sum(x * norm(d) for x, d in zip(w, deltas, strict=True))


def karcher(models, base, max_iter=10, tol=1e-5):
    models = [model.double() for model in models]
    valid = [model for model in models if norm(model) > tol]
    if not valid:
        return sum(models) / len(models)
    units = [model / norm(model) for model in valid]
    mean = sum(units) / len(units)
    mean = units[0] if norm(mean) < tol else mean / norm(mean)
    for _ in range(max_iter):
        tangent = torch.zeros_like(mean)
        for unit in units:
            dot = max(-1.0, min(1.0, float((unit * mean).sum())))
            angle = math.acos(dot)
            if angle < tol or (dot < 0 and 1 - dot**2 <= 1e-10):
                continue
            tangent = tangent + angle / math.sin(angle) / len(units) * (unit - dot * mean)
        size = norm(tangent)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * tangent
        mean = mean / norm(mean)
    return mean * sum(map(norm, models)) / len(models)


def model_stock(models, base, filter_wise=False):
    base = base.double()
    deltas = [model.double() - base for model in models]
    if filter_wise and base.ndim > 1:
        rows = zip(*(d.flatten(0, -2) for d in deltas), strict=True)
        ratios = torch.tensor([ratio(row) for row in rows]).double()
        t = ratios.reshape(*base.shape[:-1], 1)
    else:
        t = ratio(deltas)
    return base + t * sum(deltas) / len(deltas)


def ratio(deltas):
    count, cosines = len(deltas), []
    for i in range(count):
        for j in range(i + 1, count):
            size = norm(deltas[i]) * norm(deltas[j])
            cosines.append(float((deltas[i] * deltas[j]).sum()) / size if size else 0.0)
    cosine = sum(cosines) / len(cosines)
    divisor = 1 + (count - 1) * cosine
    return 0.0 if abs(divisor) < 1e-6 else min(1.0, max(0.0, count * cosine / divisor))
