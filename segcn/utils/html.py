"""The parts that the package's HTML pages share: one file each, with its images inside."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

# --- html_parts: The parts that the package's HTML pages share: one file each, with its images inside.

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
    """How a page begins, its title as heading."""
    title = escape(title)
    return [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>',
        f"<h1>{title}</h1>",
    ]


def img(image: np.ndarray) -> str:
    """An image, uint8 [H, W, 3], in the page itself."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", optimize=True)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def plot(figure: Figure, about: str) -> str:
    """A figure in the page itself, sharp on fine screens; about: what it shows, in words."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    width = Image.open(file).width // 1.5
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="plot" alt="{escape(about)}" width="{width:.0f}" src="data:image/png;base64,{data}">'


def as_table(heads: list[str], rows: Iterable[tuple]) -> str:
    """Numbers to the right; texts are HTML already."""
    lines = ["<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for row in rows:
        cells = (f'<td class="n">{cell:,}</td>' if isinstance(cell, int) else f"<td>{cell}</td>" for cell in row)
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


# --- modelcard: The model card of a run, README.md in its folder: what it paints from, the data, the training and how good it is.


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns in Markdown, or nothing."""
    lines = [f"| {left} | {str(right).replace('|', chr(92) + '|')} |" for left, right in rows]
    return "\n".join(["| | |", "|---|---|", *lines]) if rows else ""
