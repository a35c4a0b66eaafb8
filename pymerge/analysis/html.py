"""The report of an analysis as HTML: one page without scripts, which fetches nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pymerge.analysis.plots import colour, lines, matrix, number, percent, stacked, tint
from pymerge.messages.html import STYLE, escaped
from pymerge.messages.words import counted

Data = dict[str, Any]

MOST_KINDS = 60
MOST_TENSORS = 1000  # lines of the table of tensors; a file of all would be slow to open

_STYLE = f"""{STYLE}
.pymerge{{padding:20px 24px;max-width:1400px;margin:0 auto;box-sizing:border-box}}
.pymerge h1{{font-size:22px;margin:0 0 4px;color:inherit}}
.pymerge h2{{font-size:15px;margin:0 0 2px;color:inherit}}
.pymerge p{{margin:0 0 8px;color:var(--soft)}}
.pymerge .cards{{display:flex;flex-wrap:wrap;gap:14px;align-items:flex-start}}
.pymerge .card{{background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:12px 14px;margin:0 0 14px;max-width:100%;box-sizing:border-box;overflow-x:auto}}
.pymerge .plot{{flex:1 1 420px}}
.pymerge svg{{max-width:100%;height:auto;display:block}}
.pymerge svg text{{font-size:11px;fill:var(--soft);font-family:inherit}}
.pymerge svg .value{{fill:var(--text)}} .pymerge svg .small{{font-size:9.5px}}
.pymerge .swatch{{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}}
.pymerge details>summary{{cursor:pointer;color:var(--soft)}}
.pymerge .legend{{display:flex;flex-wrap:wrap;gap:2px 14px;color:var(--soft);font-size:12px}}
"""


# Of every page, by which it is known.
BEGIN = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="generator" content="pymerge">'
)


def page(data: Data) -> str:
    """A whole page. data: `Analysis.to_dict()`."""
    return (
        f'{BEGIN}<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escaped(_title(data))}</title>"
        "<style>body{margin:0;background:#fff}"
        "@media (prefers-color-scheme:dark){body{background:#14181d}}</style></head>"
        f"<body>{fragment(data)}</body></html>\n"
    )


def fragment(data: Data) -> str:
    """The same to stand in another page, such as a notebook."""
    return f'<div class="pymerge"><style>{_STYLE}</style>{"".join(_sections(data))}</div>'


def _title(data: Data) -> str:
    return f"{data['method']} of {counted(len(data['models']), 'model')}"


def _sections(data: Data) -> Iterator[str]:
    total = data["total"]
    yield f"<h1>{escaped(_title(data))}</h1>"
    base = f", base: {data['base']}" if data["base"] is not None else ", without a base"
    yield (
        f"<p>{counted(total['tensors'], 'tensor')}, {total['elements']:,} parameters"
        f"{escaped(base)}. pymerge {escaped(data['version'])}</p>"
    )
    if not data["models"] or not total["tensors"]:
        yield '<div class="card"><p>Nothing is merged here.</p></div>'
        return
    yield _card("Models", _of_models(data), "Over all tensors.")
    squares = [
        _card(
            "Cosines",
            matrix("cosines of task vectors", total["cosines"], least=-1, most=1),
            "Of task vectors. Models by their numbers.",
        ),
        _card(
            "Overlap of masks",
            matrix("overlap of masks", total["overlaps"], least=-1, most=1),
            "What both keep, of what either keeps.",
        ),
    ]
    if total["alignment"] is not None:
        known = [v for row in total["alignment"] for v in row if v is not None]
        squares.append(
            _card(
                "Task-subspace alignment",
                matrix(
                    "alignment of task vectors with the tasks' inputs",
                    total["alignment"],
                    least=-1,
                    most=max([1e-300, *known]),
                    rows="task vector, task",
                ),
                "Rows: task vectors; columns: the inputs of which task. 1 is a chance direction.",
            )
        )
    yield f'<div class="cards">{"".join(squares)}</div>'
    votes = list(zip(total["voting"], total["conflicts"], strict=True))
    yield '<div class="cards">'
    yield _card(
        "Sign conflicts",
        stacked("sign conflicts by number of models", votes, total["elements"])
        + '<div class="legend"><span><i class="swatch"'
        ' style="background:rgba(var(--warm),.9)"></i>both signs</span><span><i class="swatch"'
        ' style="background:rgba(var(--cool),.55)"></i>one sign, or no vote</span></div>',
        f"{percent(total['conflict_share'])} of all parameters. Over how many models vote.",
        plot=True,
    )
    densities = data["densities"]
    if densities:
        yield _card(
            "Share of the mass",
            lines(
                "share of the mass above each density",
                total["mass_shares"],
                [f"{100 * d:g} %" for d in densities],
                names=_numbered(data),
                as_percent=True,
                positions=densities,
                most=1.0,
                across="density",
            )
            + _legend(data),
            "The sum of the largest magnitudes of each tensor, of the sum of all.",
            plot=True,
        )
    yield "</div>"
    yield from _by_layer(data)
    yield _by_kind(data)
    yield _by_tensor(data)


def _card(title: str, content: str, note: str = "", *, plot: bool = False) -> str:
    below = f"<p>{escaped(note)}</p>" if note else ""
    kind = "card plot" if plot else "card"
    return f'<section class="{kind}"><h2>{escaped(title)}</h2>{below}{content}</section>'


def _numbered(data: Data) -> list[str]:
    return [f"{k + 1}: {_short(name)}" for k, name in enumerate(data["models"])]


def _short(name: str, most: int = 40) -> str:
    """The end of a long name, which tells models apart more often than its beginning."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _legend(data: Data) -> str:
    names = _numbered(data)
    if sum(map(len, names)) > 100:  # the table of models has them
        names = [str(k + 1) for k in range(len(names))]
    items = "".join(
        f'<span title="{escaped(data["models"][k])}"><i class="swatch"'
        f' style="background:{colour(k)}"></i>{escaped(name)}</span>'
        for k, name in enumerate(names)
    )
    return f'<div class="legend">{items}</div>'


def _of_models(data: Data) -> str:
    total = data["total"]
    headings = ["model", "norm"]
    headings += ["of the base's"] if data["base"] is not None else []
    headings += ["largest", "kept", "agreed", "contribution"]
    bad = any(total["non_finite"])
    headings += ["not finite"] if bad else []
    rows = []
    for k, name in enumerate(data["models"]):
        cells = [number(total["norms"][k])]
        if data["base"] is not None:
            cells.append(percent(total["relative_norms"][k], 2))
        cells += [
            number(total["largest"][k]),
            percent(total["kept_shares"][k]),
            percent(total["agreed_shares"][k]),
            percent(total["contributions"][k]),
        ]
        cells += [f"{total['non_finite'][k]:,}"] if bad else []
        first = (
            f'<td class="name"><i class="swatch" style="background:{colour(k)}"></i>'
            f"{k + 1}: {escaped(name)}</td>"
        )
        rows.append("<tr>" + first + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return _table(headings, rows)


def _table(headings: Sequence[str], rows: Sequence[str]) -> str:
    """rows: as HTML; the first column holds names."""
    first, *others = headings
    head = f'<th class="name">{escaped(first)}</th>'
    head += "".join(f"<th>{escaped(each)}</th>" for each in others)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _by_layer(data: Data) -> Iterator[str]:
    """Lines over the layers of every list of blocks."""
    stacks: dict[str, list[Data]] = {}
    for layer in data["layers"]:
        stacks.setdefault(layer["name"].rpartition(".")[0], []).append(layer)
    based = data["base"] is not None
    for stack, layers in stacks.items():
        labels = [layer["name"].rpartition(".")[2] for layer in layers]
        norms = "relative_norms" if based else "norms"
        plots = [
            ("Norms", norms, "Of task vectors, of the base's norm." if based else ""),
            ("Contributions", "contributions", "To the update of each layer."),
        ]
        yield '<div class="cards">'
        for title, key, note in plots:
            values = [[layer[key][k] for layer in layers] for k in range(len(data["models"]))]
            if all(value is None for row in values for value in row):
                continue
            yield _card(
                f"{title} by layer",
                lines(
                    f"{title} by layer",
                    values,
                    labels,
                    names=_numbered(data),
                    as_percent=based or key != norms,
                    across=_short(stack),
                )
                + _legend(data),
                note,
                plot=True,
            )
        yield _card(
            "Sign conflicts by layer",
            lines(
                "sign conflicts by layer",
                [[layer["conflict_share"] for layer in layers]],
                labels,
                names=["conflicts"],
                as_percent=True,
                across=_short(stack),
            ),
            "The share of the layer's parameters.",
            plot=True,
        )
        yield "</div>"


def _by_kind(data: Data) -> str:
    """For each kind of module norms and contributions, with a cell for each model."""
    based = data["base"] is not None
    key = "relative_norms" if based else "norms"
    kinds = data["kinds"]
    found = [value for kind in kinds for value in kind[key] if value is not None]
    most = max([1e-300, *found])
    models = [str(k + 1) for k in range(len(data["models"]))]
    norms, contributions = [], []
    for kind in kinds[:MOST_KINDS]:
        name = f'<td class="name">{escaped(kind["name"])}</td>'
        cells = f"<td>{kind['elements']:,}</td><td>{percent(kind['conflict_share'])}</td>"
        for value in kind[key]:
            shown = percent(value, 1 if value and value >= 0.1 else 2) if based else number(value)
            cells += f'<td style="background-color:{tint(value, -1, most)}">{shown}</td>'
        norms.append(f"<tr>{name}{cells}</tr>")
        cells = "".join(
            f'<td style="background-color:{tint(value, -1, 1)}">{percent(value, 0)}</td>'
            for value in kind["contributions"]
        )
        contributions.append(f"<tr>{name}{cells}</tr>")
    more = len(kinds) - MOST_KINDS
    note = f" {counted(more, 'more kind')} in the JSON file." if more > 0 else ""
    of = "Norms of task vectors, of the base's norm" if based else "Norms"
    return (
        '<div class="cards">'
        + _card(
            "Kinds of modules",
            _table(["kind", "parameters", "conflicts", *models], norms),
            f"{of}, over all layers. Models by their numbers.{note}",
        )
        + _card(
            "Contributions by kind",
            _table(["kind", *models], contributions),
            f"To the update, over all layers.{note}",
        )
        + "</div>"
    )


def _by_tensor(data: Data) -> str:
    tensors = data["tensors"]
    headings = ["tensor", "shape", "norms", "kept", "conflicts", "contributions"]
    bad = any(data["total"]["non_finite"])
    headings += ["not finite"] if bad else []
    rows = []
    for tensor in tensors[:MOST_TENSORS]:
        cells = [
            "×".join(map(str, tensor["shape"])),
            " ".join(map(number, tensor["norms"])),
            " ".join(percent(share, 0) for share in tensor["kept_shares"]),
            percent(tensor["conflict_share"]),
            " ".join(percent(share, 0) for share in tensor["contributions"]),
        ]
        cells += [f"{sum(tensor['non_finite']):,}"] if bad else []
        name = f'<td class="name">{escaped(tensor["name"])}</td>'
        rows.append(f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    more = len(tensors) - MOST_TENSORS
    note = f" The first {MOST_TENSORS:,}; all are in the JSON file." if more > 0 else ""
    return (
        f'<section class="card"><details><summary>{counted(len(tensors), "tensor")}.{note}'
        f"</summary>{_table(headings, rows)}</details></section>"
    )
