"""YAML to plain data, with the line of every entry: bounded, safe tags only, duplicate keys are an
error.

Whatever the bytes are, the only exception is `ConfigError`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

from pymerge.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
# Entries after aliases are expanded: ten nested aliases of ten entries each are 10**10.
MAX_ENTRIES = 50_000
# Length of a number: YAML 1.1's base-60 integers (1:30:00) take quadratic time.
MAX_DIGITS = 400

# A location in the data: mapping keys and sequence indices from the root.
Path = tuple[str | int, ...]

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_COLLECTIONS = {_TAG + "map", _TAG + "seq"}
_SCALARS = {_TAG + kind for kind in ("str", "int", "float", "bool", "null")}
# Plain text that YAML 1.1 reads as a date, but which may be the name of a folder.
_AS_TEXT = {_TAG + "timestamp"}


@dataclass
class Document:
    """Plain data (dict with text keys, list, str, int, float, bool, None) and the line of each
    entry.
    """

    data: Any
    source: str
    lines: dict[Path, int] = field(default_factory=dict)
    columns: dict[Path, int] = field(default_factory=dict)
    # Keys of the top level that hold anchors for aliases elsewhere.
    shared: frozenset[str] = frozenset()

    def where(self, path: Path) -> str:
        """ "FILE, line N" of an entry, or of the nearest entry around it; with the column in a file
        of one line.
        """
        while path and path not in self.lines:
            path = path[:-1]
        if path not in self.lines:
            return self.source
        column = f", column {self.columns[path]}" if max(self.lines.values()) == 1 else ""
        return f"{self.source}, line {self.lines[path]}{column}"


def read_yaml(text: str | bytes, source: str) -> Document:
    """Parse one YAML document. `source` is its name in messages.

    ConfigError: several documents, and what `read_documents` refuses.
    """
    documents = read_documents(text, source)
    if len(documents) > 1:
        raise ConfigError(
            f"{documents[1].where(())}: a second YAML document begins here, and a recipe is one."
            " `pymerge merge` takes several with --intermediate-dir; or save each as a file, merge"
            " them one after the other, and name the output of one as a model of the next"
        )
    return documents[0]


def read_documents(text: str | bytes, source: str) -> list[Document]:
    """Parse the YAML documents of a file, at least one. `source` is its name in messages.

    ConfigError: not YAML (with line and column), not UTF-8, larger than 1 MiB, nested deeper than
    32, more than 50000 entries once aliases are expanded, keys that are not text or that repeat,
    tags beyond YAML's own scalars.
    """
    if isinstance(text, bytes):
        if len(text) > MAX_BYTES:
            raise ConfigError(
                f"{source} has {len(text)} bytes; a configuration has at most {MAX_BYTES}"
            )
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{source} is not UTF-8 text: {error.reason} at byte {error.start}"
            ) from None
    if len(text) > MAX_BYTES:
        raise ConfigError(
            f"{source} has {len(text)} characters; a configuration has at most {MAX_BYTES}"
        )
    try:
        _check_depth(text, source)
        nodes = list(yaml.compose_all(text, Loader=_LOADER)) or [None]
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_problem(error, source, text)) from None
    except ConfigError:
        raise
    except ValueError as error:  # from inside PyYAML, for some bad escapes
        raise ConfigError(f"{source} is not YAML: {error}") from None
    documents, problems, entries = [], [], 0
    for node in nodes:
        document = Document(None, source)
        documents.append(document)
        if node is not None:
            builder = _Builder(document, entries)
            document.data = builder.build(node, (), 0)
            document.shared = _shared(node)
            problems += builder.problems
            entries = builder.entries
    if problems:
        raise ConfigError(problems)
    return documents


def as_yaml(data: Any) -> str:
    """Plain data as a document, its keys in their order."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text


def _check_depth(text: str, source: str) -> None:
    """Before `compose_all`, which recurses: the events come one by one and know no recursion."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ConfigError(
                    f"{source}, line {event.start_mark.line + 1}: nested deeper than {MAX_DEPTH}"
                    " levels"
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _shared(root: yaml.Node) -> frozenset[str]:
    """Keys of the top level under which something has an anchor that another key's value uses.

    An alias is the very node that it stands for, so nodes are told apart by their identity.
    """
    if not isinstance(root, yaml.MappingNode):
        return frozenset()
    first: dict[int, str] = {}  # node -> the first key under which it lies
    found = set()
    for key, value in root.value:
        name = str(key.value)
        left, seen = [value], set()
        while left:
            node = left.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            owner = first.setdefault(id(node), name)
            if owner != name:
                found.add(owner)
            if isinstance(node, yaml.MappingNode):
                left += [each for pair in node.value for each in pair]
            elif isinstance(node, yaml.SequenceNode):
                left += node.value
    return frozenset(found)


def _syntax_problem(error: yaml.YAMLError, source: str, text: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = (
        getattr(error, "problem", None)
        or getattr(error, "reason", None)
        or str(error).split("\n")[0]
    )
    place = ""
    if mark is not None:
        place = f", line {mark.line + 1}, column {mark.column + 1}"
        if text[mark.index : mark.index + 1] == "\t":
            what = "a tab, which indents nothing in YAML; write spaces"
    return f"{source}{place} is not YAML: {what}"


class _Builder:
    def __init__(self, document: Document, entries: int) -> None:
        """entries: of the documents before this one, which count too."""
        self.document = document
        self.problems: list[str] = []
        self.entries = entries
        self.scalars = yaml.SafeLoader("")

    def at(self, node: yaml.Node) -> str:
        return f"{self.document.source}, line {node.start_mark.line + 1}"

    def build(self, node: yaml.Node, path: Path, depth: int) -> Any:
        self.count(node)
        self.check_depth(node, depth)
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        self.document.columns.setdefault(path, node.start_mark.column + 1)
        if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTIONS:
            self.problems.append(
                f"{self.at(node)}: tag {_short(node.tag)} is not allowed; remove it"
            )
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i), depth + 1) for i, item in enumerate(node.value)]
        return self.scalar(node)

    def count(self, node: yaml.Node) -> None:
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            raise ConfigError(
                f"{self.at(node)}: more than {MAX_ENTRIES} entries, aliases expanded; a recipe has"
                " a few dozen"
            )

    def check_depth(self, node: yaml.Node, depth: int) -> None:
        if depth > MAX_DEPTH:  # reached through aliases, of an anchor inside itself too
            raise ConfigError(f"{self.at(node)}: aliases nest deeper than {MAX_DEPTH} levels")

    def mapping(self, node: yaml.MappingNode, path: Path, depth: int) -> dict[str, Any]:
        self.check_depth(node, depth)
        self.count(node)
        result: dict[str, Any] = {}
        first_line: dict[Hashable, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == _TAG + "merge":
                merged.append(value_node)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(
                    f"{self.at(key_node)}: a key must be text, not a list or a mapping"
                )
                continue
            # The text as written: `on: 1` and `1: x` are unknown keys, not True and 1.
            key = key_node.value
            if key in first_line:
                self.problems.append(
                    f"{self.at(key_node)}: key {_short(key)} is already on line {first_line[key]};"
                    " keep one of the two"
                )
                continue
            first_line[key] = line
            self.document.lines[(*path, key)] = line
            self.document.columns[(*path, key)] = key_node.start_mark.column + 1
            result[key] = self.build(value_node, (*path, key), depth + 1)
        for value_node in merged:
            for mapping in self.merge_sources(value_node):
                for key, value in self.mapping(mapping, path, depth + 1).items():
                    result.setdefault(key, value)
        return result

    def merge_sources(self, node: yaml.Node) -> list[yaml.MappingNode]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        self.entries += len(nodes)
        self.count(node)
        mappings = [item for item in nodes if isinstance(item, yaml.MappingNode)]
        if len(mappings) != len(nodes):
            self.problems.append(f"{self.at(node)}: '<<' takes a mapping or a list of mappings")
        return mappings

    def scalar(self, node: yaml.Node) -> Any:
        if node.tag in _AS_TEXT:
            return node.value
        if node.tag not in _SCALARS:
            self.problems.append(
                f"{self.at(node)}: tag {_short(node.tag)} is not allowed; remove it"
            )
            return None
        kind = node.tag.removeprefix(_TAG)
        if kind in ("int", "float") and len(node.value) > MAX_DIGITS:
            self.problems.append(f"{self.at(node)}: {_short(node.value)} is not a valid {kind}")
            return None
        try:
            return self.scalars.construct_object(node)
        except (ValueError, OverflowError, LookupError, yaml.YAMLError):
            # LookupError: `!!int ''` and `!!bool x`.
            self.problems.append(f"{self.at(node)}: {_short(node.value)} is not a valid {kind}")
            return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
