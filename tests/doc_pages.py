"""The documentation as the tests read it: pages, headings' anchors, links, blocks of code."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])

FENCE = re.compile(r"^( *)```(\w*)$")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: the page, the number of its first line, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def script(path: str) -> ModuleType:
    """A script of the repository as a module."""
    name = f"script_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their names
    sys.path.insert(0, str((ROOT / path).parent))  # as for what is run
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[Block]:
    """The page's blocks of these languages; of all of them where none is named."""
    found: list[Block] = []
    begun: tuple[int, str, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if fence is None:
            if begun is not None:
                lines.append(line.removeprefix(begun[2]))
        elif begun is None:
            begun, lines = (number + 1, fence[2], fence[1]), []
        else:
            found.append(Block(page, begun[0], begun[1], "\n".join(lines) + "\n"))
            begun = None
    assert begun is None, f"{name_of(page)}:{begun[0]}: the block does not end"
    return [each for each in found if not languages or each.language in languages]


def prose(page: Path) -> str:
    """The page without its blocks."""
    lines, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            lines.append(line)
    return "\n".join(lines)


def links(page: Path) -> Iterator[str]:
    """Targets of the page's links and pictures."""
    for found in LINK.finditer(re.sub(r"`[^`\n]*`", "", prose(page))):
        yield found[1]


def anchors(page: Path) -> set[str]:
    """What links may name behind a #: the headings as repository hosts, and mkdocs.yml, spell
    them.
    """
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        if count:
            found[f"{slug}-{count}"] = 1
    return set(found)
