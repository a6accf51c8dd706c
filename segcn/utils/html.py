"""Pages and cards from jinja2 templates; a page is one file with its images inside."""

import base64
import io
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


def render(template: str, **values: Any) -> str:
    """Fill in a template of the package, such as "evaluate/templates/report.html".

    Values are escaped in .html templates unless they are Markup, as `img` and `plot` give, and are left as they are in
    .md ones. A missing value is an error. Pages extend "utils/templates/page.html".
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        autoescape=select_autoescape(["html"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin: 2em 0 0 } p { margin: 0.3em 0 }
table { border-collapse: collapse; margin: 0.6em 0 } td, th { padding: 2px 14px 2px 0; text-align: left }
td { border-top: 1px solid #ddd; vertical-align: top } td.n { text-align: right }
.error { color: #b3261e } .warning { color: #9a6700 } .fine { color: #1a7f37 } .grey { color: #666 }
.nowrap { white-space: nowrap }
.bar { display: inline-block; height: 0.7em } img { display: block; margin: 0 8px 2px 0; float: left }
img.plot { float: none; max-width: 100%; height: auto; margin: 0.8em 0 }
p { overflow-wrap: anywhere }
.row { clear: both; overflow: hidden; padding: 6px 0; border-top: 1px solid #eee }
"""


def head(title: str) -> list[str]:
    """The beginning of a page, with its title as heading."""
    title = escape(title)
    return [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>',
        f"<h1>{title}</h1>",
    ]


def img(image: "np.ndarray") -> Markup:
    """An image, uint8 [H, W, 3], as an <img> that holds its own PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", optimize=True)
    return Markup(f'<img alt="" src="{_data_uri(file)}">')


def plot(figure: "Figure", about: str) -> Markup:
    """A Matplotlib figure as an <img>, sharp on high-resolution screens; about: what it shows, in words."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    width = Image.open(file).width // 1.5
    return Markup(f'<img class="plot" alt="{escape(about)}" width="{width:.0f}" src="{_data_uri(file)}">')


def _data_uri(png: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def as_table(heads: list[str], rows: Iterable[tuple]) -> str:
    """Numbers to the right; texts are HTML already."""
    lines = ["<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for row in rows:
        cells = (f'<td class="n">{cell:,}</td>' if isinstance(cell, int) else f"<td>{cell}</td>" for cell in row)
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns in Markdown, or nothing."""
    lines = [f"| {left} | {str(right).replace('|', chr(92) + '|')} |" for left, right in rows]
    return "\n".join(["| | |", "|---|---|", *lines]) if rows else ""
