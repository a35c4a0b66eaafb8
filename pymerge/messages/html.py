"""HTML for people: escaped text, tables, and how they look on light and dark screens."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from pymerge.messages.words import printable

# Of everything inside of an element of the class. Notebooks show it among their own style, so the
# colours of text and ground are set together.
STYLE = """
.pymerge{--ground:#fff;--text:#1c2128;--soft:#5b6470;--line:#d9dee4;--card:#f6f8fa;
--warm:194,65,12;--cool:29,78,216;color-scheme:light;
background:var(--ground);color:var(--text);font:14px/1.45 system-ui,sans-serif}
@media (prefers-color-scheme:dark){.pymerge{--ground:#14181d;--text:#e3e8ee;--soft:#9aa5b1;
--line:#39424c;--card:#1c2229;--warm:251,146,60;--cool:96,165,250;color-scheme:dark}}
.pymerge table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:0;
color:inherit;background:none}
.pymerge th,.pymerge td{padding:3px 7px;text-align:right;border-bottom:1px solid var(--line);
color:inherit;background-color:transparent;white-space:nowrap}
.pymerge th{color:var(--soft);font-weight:500;vertical-align:bottom}
.pymerge .name{text-align:left;overflow-wrap:anywhere;white-space:normal;min-width:170px}
"""


def escaped(text: object) -> str:
    """Text that HTML shows as it is, control characters escaped."""
    return html.escape(printable(str(text)))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, names: int = 1) -> str:
    """A table of text. names: how many of the first columns hold names; the others hold numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        made = []
        for place, cell in enumerate(cells):
            kind = ' class="name"' if place < names else ""
            made.append(f"<{tag}{kind}>{escaped(cell)}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', headings)}</thead><tbody>{body}</tbody></table>"
