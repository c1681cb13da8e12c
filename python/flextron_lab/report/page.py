"""One self-contained HTML page of sections: text, figures as inline SVG, tables."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; background: #fafbfc; margin: 0; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 4px 0 12px; max-width: 80ch; } .lead { color: #55606e; }
section { background: #fff; border: 1px solid #e2e7ec; border-radius: 8px; padding: 18px 20px; margin: 20px 0; }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #edf0f3; }
th { color: #55606e; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.text { font: 15px/2.0 ui-monospace, monospace; white-space: pre-wrap; }
.text span { padding: 2px 0; border-radius: 2px; }
""".strip()


@dataclass(frozen=True)
class Section:
    """A heading with a sentence or two, and beneath it the figures, table and markup that are given.

    Attributes:
        title, text: plain text, which is escaped.
        figures: matplotlib figures, which are closed when the page is written.
        header, rows: the cells of a table.
        markup: HTML, which is inserted unchanged.
    """

    title: str
    text: str = ""
    figures: Sequence[Any] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    markup: str = ""


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page as HTML without scripts, links or requests."""
    body = "\n".join(_section(place, section) for place, section in enumerate(sections))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n{body}\n'
        "</main>\n</body>\n</html>\n"
    )


def _section(place: int, section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    parts += [_svg(figure, f"s{place}f{i}") for i, figure in enumerate(section.figures)]
    if section.rows:
        parts.append(_table(section.header, section.rows))
    if section.markup:
        parts.append(section.markup)
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _svg(figure: Any, prefix: str) -> str:
    """The figure as inline SVG, whose ids get a prefix so that they are unique on the page."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    return re.sub(r'href="#', f'href="#{prefix}-', svg)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>\n{line(header, "th")}\n{body}\n</table></div>'
