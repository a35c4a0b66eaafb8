"""Links between files of the repository lead somewhere, and the site has all pages."""

from __future__ import annotations

import re

import pytest
from doc_pages import PAGES, ROOT, anchors, blocks, links, name_of, script

hooks = script("docs/hooks.py")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} does not exist"
        assert there.is_relative_to(ROOT), f"{target} is not of this repository"
        if anchor:
            assert anchor in anchors(there), f"{target}: no heading has that anchor"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_two_headings_of_a_page_share_an_anchor(page):
    """The second one's has a number that hosts and mkdocs choose differently."""
    if page.name != "CHANGELOG.md":
        assert not [each for each in anchors(page) if re.search(r"-\d+$", each)
                    and re.sub(r"-\d+$", "", each) in anchors(page)]  # fmt: skip


def test_every_page_is_in_the_sites_order():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = set(re.findall(r"[\w/]+\.md", nav))
    pages = {
        name_of(page).removeprefix("docs/") for page in PAGES if name_of(page).startswith("docs/")
    }
    assert listed == pages | set(hooks.PAGES.values())


def test_all_blocks_say_what_they_are():
    for page in PAGES:
        for block in blocks(page):
            known = {"", "python", "sh", "yaml", "toml"}
            assert block.language in known, f"{block}: {block.language}"


@pytest.mark.parametrize(
    ("text", "page", "wanted"),
    [
        ("[a](../CONTRIBUTING.md#tests)", "index.md", "[a](contributing.md#tests)"),
        ("[a](../../CONTRIBUTING.md)", "spec/ties.md", "[a](../contributing.md)"),
        ("[a](docs/spec/ties.md#rules)", "changelog.md", "[a](spec/ties.md#rules)"),
        ("[a](CONTRIBUTING.md)", "changelog.md", "[a](contributing.md)"),
        ("[a](methods.md)", "quality.md", "[a](methods.md)"),
        ("[a](ties.md)", "spec/mats.md", "[a](ties.md)"),
        ("[a](#here)", "index.md", "[a](#here)"),
        ("[a](https://example.org/x.md)", "index.md", "[a](https://example.org/x.md)"),
        ("see [`a`](../setup.py).", "index.md", "see `a`."),
        ("```\n[a](../setup.py)\n```", "index.md", "```\n[a](../setup.py)\n```"),
    ],
)  # fmt: skip
def test_links_of_the_site(text, page, wanted):
    assert hooks.rewritten(text, page) == wanted


def test_links_of_the_site_to_source_files():
    text = "[a](../benchmarks/results#x)"
    wanted = "[a](https://host.example/a/b/blob/main/benchmarks/results#x)"
    assert hooks.rewritten(text, "index.md", "https://host.example/a/b/") == wanted


def test_pictures_of_two_schemes_are_part_of_the_page():
    text = hooks.rewritten("![Speed](images/speed.svg)", "benchmarks.md")
    assert text.startswith("<figure") and "</svg></figure>" in text and "\n" not in text
    plain = "![Accuracy](images/quality.svg)"
    assert hooks.rewritten(plain, "quality.md") == plain


@pytest.mark.parametrize(
    "text",
    [
        '<script defer src="https://host.example/a.js"></script>',
        "<script src=//host.example/a.js>",
        '<link rel="stylesheet" href="https://host.example/a.css">',
        '<link href="https://host.example/a.css" rel=stylesheet>',
        '<link rel="preconnect" href="https://host.example" crossorigin>',
        '<img alt="a" src="https://host.example/a.png">',
        "@font-face{src:url(https://host.example/a.woff)}",
        '@import "https://host.example/a.css";',
    ],
)
def test_what_a_browser_would_fetch_is_seen(text):
    assert hooks.FETCHED.search(text)


@pytest.mark.parametrize(
    "text",
    [
        '<a href="https://host.example/">a</a>',
        '<link rel="canonical" href="https://host.example/">',
        '<script src="assets/a.js"></script><a href="https://host.example/">',
        '<svg xmlns="http://www.w3.org/2000/svg">',
        "url(data:image/svg+xml;charset=utf-8,x)",
    ],
)
def test_what_a_browser_does_not_fetch_is_left(text):
    assert not hooks.FETCHED.search(text)


def test_docstrings_as_markdown():
    pytest.importorskip("griffe")
    docstrings = script("docs/docstrings.py")
    text = (
        "First line.\n\nBy docs/spec/ties.md:\n\n    out = a\n\n"
        "a, b: tensors of\n    one shape\nc: more\nNote: no argument.\n\nc: again"
    )
    assert docstrings.as_markdown(text, {"a", "b", "c"}) == (
        "First line.\n\nBy [docs/spec/ties.md](spec/ties.md):\n\n    out = a\n\n"
        "- `a`, `b`: tensors of\n    one shape\n- `c`: more\n\nNote: no argument.\n\n- `c`: again"
    )
