"""What the site needs beside mkdocs' plugins.

Pages that lie outside of docs/ become pages of the site, and links between files of the repository
lead to them. Pictures of two colour schemes are set into the page, so that they follow its switch.
A built site that would ask another host for anything is an error.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Files of the repository that are pages too.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
HOME = {"README.md": "index.md"}

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```")
# What a browser fetches of its own accord.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|audio|video|object|embed)\b"
    r"[^>]*?\s(?:src|data)=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect|icon|modulepreload))"
    r"[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>"
    r"|@import\s+[\"']?(?:url\()?[\"']?(?:https?:)?//|url\([\"']?(?:https?:)?//",
)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return rewritten(markdown, page.file.src_uri, config.repo_url or "")


def rewritten(markdown: str, page: str, repository: str = "") -> str:
    """The text of a page of the site, with links that lead to pages of the site.

    A link to another file of the repository leads to its host, where there is a `repository`, else
    it is its text alone.
    """
    lines, fenced = [], False
    for line in markdown.split("\n"):
        if FENCE.match(line):
            fenced = not fenced
        lines.append(line if fenced else LINK.sub(lambda m: _link(m, page, repository), line))
    return "\n".join(lines)


def _link(found: re.Match[str], page: str, repository: str) -> str:
    picture, text, target = found.groups()
    path, hash_, anchor = target.partition("#")
    if "://" in target or not path or path.startswith("mailto:"):
        return found[0]
    # The page's place in the repository, and from there the target's.
    here = "" if page in PAGES.values() else posixpath.join("docs", posixpath.dirname(page))
    there = posixpath.normpath(posixpath.join(here, path))
    if picture and there.endswith(".svg") and (drawn := inline(ROOT / there, text)):
        return drawn
    named = {**PAGES, **HOME}.get(there)
    if named is None and there.startswith("docs/"):
        named = there.removeprefix("docs/")
    if named is not None:
        relative = posixpath.relpath(named, posixpath.dirname(page) or ".")
        return f"{picture}[{text}]({relative}{hash_}{anchor})"
    if repository:
        return f"[{text}]({repository.rstrip('/')}/blob/main/{there}{hash_}{anchor})"
    return text


def inline(path: Path, text: str) -> str:
    """The element of a picture that has colours for both schemes; empty for any other."""
    drawn = path.read_text(encoding="utf-8")
    if 'class="scheme"' not in drawn:
        return ""
    drawn = drawn[drawn.index("<svg") :].replace("\n", "")
    return f'<figure class="picture" role="img" aria-label="{text}">{drawn}</figure>'


def on_post_build(config: Any) -> None:
    from mkdocs.exceptions import PluginError

    found = [
        f"{path.name}: {match[0][:200]}"
        for path in sorted(Path(config.site_dir).rglob("*"))
        if path.suffix in (".html", ".css")
        for match in FETCHED.finditer(path.read_text(encoding="utf-8"))
    ]
    if found:
        raise PluginError("the site asks other hosts:\n" + "\n".join(found))
