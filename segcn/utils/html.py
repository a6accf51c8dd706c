"""Pages and cards from jinja2 templates; a page is one file with its images inside."""

import base64
import io
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


def img(image: "np.ndarray", about: str) -> Markup:
    """An image, uint8 [H, W, 3], as an <img> that holds its own PNG; about: what it shows, in words."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", optimize=True)
    return Markup(f'<img alt="{escape(about)}" src="{_data_uri(file)}">')


def figure_img(figure: "Figure", about: str) -> Markup:
    """A Matplotlib figure as an <img>, sharp on high-resolution screens; about: what it shows, in words."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    width = Image.open(file).width // 1.5
    return Markup(f'<img class="plot" alt="{escape(about)}" width="{width:.0f}" src="{_data_uri(file)}">')


def _data_uri(png: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
