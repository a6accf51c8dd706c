"""Pictures that prove paired augmentation: draws, landings, borders, fits and captions, and what the network sees."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from matplotlib.figure import Figure

from segcn.augment import Draw, apply, to_output, to_source
from segcn.captions import mirrored, says_a_side
from segcn.config import FITS
from segcn.dataset import PairedDataset, Sample, to_uint8
from segcn.labels import Palette
from segcn.loss import valid_cells
from segcn.show import checkerboard, grid, hatched, outlined, overlay, read_pair, sheet

FAINT = 0.3  # strength of the mask's colours over an image
MARKS = 3  # points across a picture, and down


def augmented(pairs: PairedDataset, row: int, draws: int = 10, columns: int = 5) -> Figure:
    """One row as the first epochs see it, the mask's colours and borders over the image; out of frame is hatched."""
    samples = [pairs.sample(row, epoch) for epoch in range(draws)]
    pictures = [_overlaid(sample, pairs.split.palette) for sample in samples]
    return sheet(pictures, [_say(sample.draw) for sample in samples], columns, width=1.8)


def network_view(sample: Sample, factor: int) -> Figure:
    """What a training step is given: image, control, and the latent cells that count in the loss."""
    valid = sample.valid.numpy()
    control = (sample.control.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    cells = valid_cells(sample.valid[None], factor)[0].numpy()
    shown = [to_uint8(sample.image), control, checkerboard(to_uint8(sample.image), control), _cells(cells, valid)]
    size, side = valid.shape[0], cells.shape[0]
    heads = ["image", "control", "checkerboard", "cells in the loss"]
    notes = [
        f"{_range(sample.image)}, 3 x {size} x {size}",
        f"{_range(sample.control)}, 3 x {size} x {size}",
        "edges run on: aligned",
        f"{cells.sum()} of {side} x {side} cells",
    ]
    return grid([shown], heads, below=[notes], width=2.2)


def least_in_frame(pairs: PairedDataset, row: int, epochs: int = 16) -> Sample:
    """Of a row's first draws the one that moves most of the picture out of frame."""
    return min((pairs.sample(row, epoch) for epoch in range(epochs)), key=lambda sample: sample.valid.sum().item())


def landings(pairs: PairedDataset, row: int, draw: Draw) -> Figure:
    """Points on the borders of the mask, numbered, and where `to_output` says that the draw puts them."""
    image, mask = read_pair(pairs.split, row)
    size, side = mask.shape, pairs.resolution
    moved, moved_mask, valid = apply(*_tensors(image, mask), draw, side)
    points = _landmarks(mask, MARKS)
    figure = Figure(figsize=(8.2, 4.2 * max(1, min(1.6, size[0] / size[1]))))
    left, right = figure.subplots(1, 2)
    left.imshow(outlined(image, mask), interpolation="antialiased")
    shown = _outlined(moved.permute(1, 2, 0).numpy(), moved_mask[0].numpy(), valid[0].numpy())
    right.imshow(shown, interpolation="antialiased")
    _mark(left, points, size[::-1], f"on disk, {size[1]} x {size[0]}")
    _mark(right, to_output(points, draw, size, side), (side, side), f"where they land, {side} x {side}")
    figure.tight_layout()
    return figure


def misplaced(draw: Draw, size: tuple[int, int], resolution: int) -> tuple[float, float]:
    """How far image and mask lie from where `to_source` says, at most, in pixels of a picture of `size`.

    The picture's colours are its coordinates (so 255 a side at most), as are the classes of two masks. Its rim, where
    there is nothing to blend with, is left out.
    """
    y, x = np.mgrid[: size[0], : size[1]].astype(np.uint8)
    draw = replace(draw, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0)
    image, across, valid = apply(*_tensors(np.stack([x, y, x], -1), x), draw, resolution)
    down = apply(*_tensors(np.stack([x, y, x], -1), y), draw, resolution)[1]
    rows, columns = np.nonzero(valid[0].numpy())
    source = to_source(np.stack([columns, rows], -1), draw, size, resolution)
    inner = ((source > 2) & (source < np.array(size[::-1]) - 3)).all(-1)
    found = [torch.stack(pair)[:, rows, columns].T.numpy() for pair in ((image[0], image[1]), (across[0], down[0]))]
    of_image, of_mask = (float(np.abs(places - source)[inner].max()) for places in found)
    return of_image, of_mask


def covered(pairs: PairedDataset, row: int, draws: int = 5) -> Figure:
    """The draws that leave most empty with fill=ignore, and below them the same with fill=cover."""
    ignoring, covering = (
        PairedDataset(pairs.split, pairs.resolution, replace(pairs.augment, fill=fill), pairs.seed, pairs.fit)
        for fill in ("ignore", "cover")
    )
    in_frame = {epoch: ignoring.sample(row, epoch).valid.sum().item() for epoch in range(4 * draws)}
    epochs = sorted(in_frame, key=lambda epoch: in_frame[epoch])[:draws]
    samples = [[source.sample(row, epoch) for epoch in epochs] for source in (ignoring, covering)]
    pictures = [[_overlaid(sample, pairs.split.palette) for sample in line] for line in samples]
    notes = [[f"scale {s.draw.scale:.2f}, {s.valid.float().mean():.0%} in frame" for s in line] for line in samples]
    return grid(pictures, left=["fill=\nignore", "fill=\ncover"], below=notes, width=1.7)


def fits(pairs: PairedDataset, row: int) -> Figure:
    """A picture that is not square, and the square that each fit makes of it; square ones are cut to 8:5 first."""
    image, mask = read_pair(pairs.split, row)
    if image.shape[0] == image.shape[1]:
        cut = slice(round(image.shape[0] * 3 / 16), round(image.shape[0] * 13 / 16))
        image, mask = image[cut], mask[cut]
    pictures = []
    for fit in FITS:
        square, ids, valid = apply(*_tensors(image, mask), Draw(fit=fit), pairs.resolution)
        shown = overlay(square.permute(1, 2, 0).numpy(), ids[0].numpy(), pairs.split.palette, FAINT)
        pictures.append(hatched(shown, valid[0].numpy()))
    whole = np.full((max(image.shape), max(image.shape), 3), 255, np.uint8)
    top, left = ((whole.shape[0] - side) // 2 for side in mask.shape)
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = image
    return grid([[whole, *pictures]], [f"{mask.shape[1]} x {mask.shape[0]} pixels", *FITS], width=2.1)


def mirrored_caption(pairs: PairedDataset, row: int) -> Figure:
    """A picture with a caption that says a side, flipped with the caption kept (wrong) and with it rewritten.

    A caption that says no side is told the class that lies most to one.
    """
    image, mask = read_pair(pairs.split, row, pairs.resolution, pairs.fit)
    caption = sided_caption(pairs.split[row].caption, mask, pairs.split.palette)
    shown, turned = (
        overlay(*pair, pairs.split.palette, FAINT) for pair in ((image, mask), (image[:, ::-1], mask[:, ::-1]))
    )
    heads = ["as it is", "flipped, caption kept: wrong", "flipped and rewritten"]
    return grid([[shown, turned, turned]], heads, below=[[caption, caption, mirrored(caption)]], width=2.6)


def sided_caption(caption: str, mask: np.ndarray, palette: Palette) -> str:
    """The caption, if it says a side; else with the class whose middle is farthest from the mask's, and its side."""
    if says_a_side(caption):
        return caption
    reach = {}
    for label in palette.labels:
        columns = np.nonzero(mask == label.id)[1]
        if not label.ignore and len(columns) > mask.size / 200:
            reach[label.name] = columns.mean() / (mask.shape[1] - 1) - 0.5
    if not reach:
        return f"{caption}, seen from the left"
    name = max(reach, key=lambda name: abs(reach[name]))
    return f"{caption}, more {name} on the {'left' if reach[name] < 0 else 'right'}"


def _overlaid(sample: Sample, palette: Palette) -> np.ndarray:
    """Image, the mask's colours faintly over it and its borders drawn; hatched where out of frame."""
    mask, valid = sample.mask.numpy(), sample.valid.numpy()
    return _outlined(overlay(to_uint8(sample.image), mask, palette, FAINT), mask, valid)


def _outlined(image: np.ndarray, mask: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Image with the borders between classes, but not the one of the frame; hatched where out of frame."""
    drawn, rim = outlined(image, mask), np.zeros(valid.shape, bool)
    rim[:, 1:] |= ~valid[:, :-1]
    rim[1:] |= ~valid[:-1]
    drawn[rim] = image[rim]
    return hatched(drawn, valid)


def _tensors(image: np.ndarray, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [H, W, 3] and [H, W] -> uint8 [3, H, W] and [1, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), torch.from_numpy(mask)[None]


def _landmarks(mask: np.ndarray, across: int) -> np.ndarray:
    """In each of across x across fields the border pixel nearest to its middle, or else the middle: (x, y) [N, 2]."""
    border = np.zeros(mask.shape, bool)
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    border[1:] |= mask[1:] != mask[:-1]
    sides = np.array(mask.shape) / across
    points = []
    for field in np.ndindex(across, across):
        middle = (np.array(field) + 0.5) * sides
        near = np.argwhere(border)
        near = near[(np.abs(near - middle) < sides / 2).all(1)]
        nearest = near[np.abs(near - middle).sum(1).argmin()] if len(near) else middle
        points.append(nearest[::-1])
    return np.array(points, np.float64)


def _mark(axes, points: np.ndarray, size: Sequence[int], title: str) -> None:
    """A numbered cross at each point that lies in the picture."""
    for number, (x, y) in enumerate(points, 1):
        if 0 <= x < size[0] and 0 <= y < size[1]:
            axes.plot(x, y, "+", color="white", markersize=13, markeredgewidth=4)
            axes.plot(x, y, "+", color="black", markersize=12, markeredgewidth=1.8)
            frame = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
            axes.annotate(str(number), (x, y), (5, 5), textcoords="offset points", weight="bold", bbox=frame)
    axes.set_title(title)
    axes.axis("off")


def _cells(cells: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Latent cells, enlarged to pixels: white counts, grey does not."""
    factor = valid.shape[0] // cells.shape[0]
    tones = np.where(cells, 240, 110).astype(np.uint8).repeat(factor, 0).repeat(factor, 1)
    tones[::factor] = tones[:, ::factor] = 90
    return np.repeat(tones[..., None], 3, axis=2)


def _range(tensor: torch.Tensor) -> str:
    return f"{tensor.min().item():.2f} to {tensor.max().item():.2f}"


def _say(draw: Draw) -> str:
    """The draw in three short lines."""
    return (
        f"turn {round(draw.angle):+d}°, scale {draw.scale:.2f}\n"
        f"shift {round(100 * draw.translate_x):+d}%, {round(100 * draw.translate_y):+d}%\n"
        f"shear {round(draw.shear_x):+d}°, {round(draw.shear_y):+d}°{', flipped' if draw.flip else ''}"
    )
