"""That a tag names the version of pyproject.toml, CITATION.cff and CHANGELOG.md:

python tests/wheels/version.py v1.2.3 [--changes]

With --changes, prints what CHANGELOG.md says of that version.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def changes(root: Path, tag: str) -> str:
    """The section of CHANGELOG.md; SystemExit where something names another version."""
    version = tag.removeprefix("v")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = re.search(r"^version: (.*)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    for file, named in (
        ("pyproject.toml", project["version"]),
        ("CITATION.cff", cited and cited[1]),
    ):
        if named != version:
            sys.exit(f"{file} has version {named}, but the tag is {tag}")
    sections = re.split(r"^## ", (root / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    for section in sections[1:]:
        title, _, text = section.partition("\n")
        if title.split()[0] == version:
            return text.strip()
    sys.exit(f'CHANGELOG.md has no section "## {version}"')


if __name__ == "__main__":
    found = changes(ROOT, sys.argv[1])
    if "--changes" in sys.argv[2:]:
        print(found)
