"""The corpus that every CPython carries: the documentation of its language and library."""

from __future__ import annotations

import ast
import os
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

STDLIB = "python:docs"  # names it where a text is named

# Folders below the standard library that hold test data or other packages, not documentation.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
_PROSE_SHARE = 0.85  # letters and spaces in a paragraph; code, tables and grammar rules fall below it
_SHORTEST_PARAGRAPH = 40  # characters; shorter ones are headings and signatures
_SHORTEST_DOCUMENT = 200  # characters


def stdlib_documents() -> list[str]:
    """The English documentation that comes with CPython, one document for each topic and module.

    Language topics (``pydoc_data/topics.py``) come first, then the docstrings of each module of the standard
    library. Files are parsed, never imported. Only paragraphs of prose are kept, each once. Files are read in the
    order of their names, so one version of Python always gives the same corpus.

    Raises:
        ValueError: this Python was installed without the sources of its library.
    """
    return list(_stdlib(Path(sysconfig.get_path("stdlib"))))


@cache  # parsing takes about five seconds, and a run needs it more than once
def _stdlib(root: Path) -> tuple[str, ...]:
    seen: set[str] = set()
    documents = [*_topics(root / "pydoc_data" / "topics.py"), *_modules(root)]
    kept = [prose for text in documents if len(prose := _prose(text, seen)) >= _SHORTEST_DOCUMENT]
    if not kept:
        raise ValueError(
            f"stdlib_documents: the standard library must come with its sources, got none in {root}"
        )
    return tuple(kept)


def _topics(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from ast.literal_eval(node.value).values()


def _modules(root: Path) -> Iterator[str]:
    """The docstrings of each module, joined in the order in which they stand."""
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - _SKIPPED)
        for name in sorted(names):
            if name.endswith(".py"):
                yield from _module(Path(folder, name))


def _module(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates, and samples of bad code
        return
    yield "\n\n".join(_docstrings(tree))


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield text
        for child in node.body:
            yield from _docstrings(child)


def _prose(text: str, seen: set[str]) -> str:
    """The paragraphs of prose in ``text`` that are not in ``seen`` yet; they are added to it."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip()
        key = " ".join(paragraph.split())
        if len(key) < _SHORTEST_PARAGRAPH or key in seen or ">>>" in key:
            continue
        if sum(c.isalpha() or c == " " for c in key) >= _PROSE_SHARE * len(key):
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)
