"""What came out: faithfulness per class, the best and worst images, and one picture that tells it all."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from segcn.atomic import write_whole
from segcn.masks import colourise
from segcn.records import Split
from segcn.show import read_pair

SIDE, GAP, MARGIN = 192, 8, 20  # px
TEXT_WIDTH, HEAD = 270, 56  # px, of a column of captions and of the line of heads
HEADS = ("mask", "real image", "with the mask", "without the mask", "another caption")
INK = "#222222"


def tell(
    real: Split, painted: Split, floor: Split, recaptioned: np.ndarray, captions: Sequence[str], fit: str = "crop"
) -> Image.Image:
    """The story: rows of mask, real image and three painted ones, captions left and right of them.

    recaptioned: uint8 [N, H, W, 3], row k painted from mask k and captions[k]; N rows are told, all
    pictures made square as in training.
    """
    columns, side = len(HEADS), None if fit == "crop" else recaptioned.shape[1]
    width = 2 * (MARGIN + TEXT_WIDTH) + columns * SIDE + (columns - 1) * GAP
    sheet = Image.new("RGB", (width, HEAD + len(recaptioned) * (SIDE + GAP) + MARGIN), "white")
    pen, left = ImageDraw.Draw(sheet), MARGIN + TEXT_WIDTH
    pen.text((MARGIN, HEAD / 2), "caption", INK, _font(17, bold=True), anchor="lm")
    for column, head in enumerate(HEADS):
        pen.text((left + column * (SIDE + GAP) + SIDE / 2, HEAD / 2), head, INK, _font(17, bold=True), anchor="mm")
    for row, other in enumerate(recaptioned):
        image, mask = read_pair(real, row, side, fit)
        others = [read_pair(split, row, side, fit)[0] for split in (painted, floor)]
        pictures = [enlarged(colourise(mask, real.palette), smooth=False)]
        pictures += [enlarged(shown) for shown in (image, *others, other)]
        top = HEAD + row * (SIDE + GAP)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + column * (SIDE + GAP), top))
        _write(pen, real[row].caption, MARGIN, top + SIDE / 2)
        _write(pen, captions[row], width - MARGIN - TEXT_WIDTH + 16, top + SIDE / 2)
    return sheet


def enlarged(picture: np.ndarray, smooth: bool = True) -> Image.Image:
    """The centred square of a picture, uint8 [H, W, 3], at the story's size; without `smooth` pixels stay squares."""
    image = Image.fromarray(picture)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


def save_story(picture: Image.Image, path: Path) -> Path:
    """Write the picture as PNG, whole or not at all."""
    write_whole(path, lambda aside: picture.save(aside, format="PNG", optimize=True))
    return path


def _write(pen: ImageDraw.ImageDraw, caption: str, left: float, middle: float, most: int = 8) -> None:
    """A caption in lines of the text column's width, centred on a height."""
    font, lines = _font(22), [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) <= TEXT_WIDTH - 24 or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " …"]
    pen.multiline_text((left, middle), "\n".join(lines), INK, font, anchor="lm", spacing=7)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """matplotlib's own DejaVu Sans, which is there on every system."""
    face = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(face), size)
