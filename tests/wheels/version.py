"""That a tag names the version of pyproject.toml, the package, CITATION.cff and CHANGELOG.md:

python tests/wheels/version.py v1.2.3 [--changes]

With --changes, prints what CHANGELOG.md says of that version.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def changes(root: Path, tag: str) -> str:
    """The section of CHANGELOG.md; SystemExit where something names another version."""
    version = tag.removeprefix("v")
    project = tomllib.loads(_read(root / "pyproject.toml"))["project"]
    own = re.search(r'^__version__ = "(.*)"$', _read(root / "pymerge/version.py"), re.MULTILINE)
    cited = re.search(r"^version: (.*)$", _read(root / "CITATION.cff"), re.MULTILINE)
    for file, named in (
        ("pyproject.toml", project["version"]),
        ("pymerge/version.py", own and own[1]),
        ("CITATION.cff", cited and cited[1]),
    ):
        if named != version:
            sys.exit(f"{file} has version {named}, but the tag is {tag}")
    sections = re.split(r"^## ", _read(root / "CHANGELOG.md"), flags=re.MULTILINE)
    for section in sections[1:]:
        title, _, text = section.partition("\n")
        if title.split()[0] == version:
            return text.strip()
    sys.exit(f'CHANGELOG.md has no section "## {version}"')


if __name__ == "__main__":
    found = changes(ROOT, sys.argv[1])
    if "--changes" in sys.argv[2:]:
        print(found)
