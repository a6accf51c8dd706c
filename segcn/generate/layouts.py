"""`segcn layouts`: new masks made from those of a data set, for `segcn generate --controls`, and how real they are.

Layout i is a function of the seed, i and the rows alone, so a stopped command resumes."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch

from segcn.data import visualize
from segcn.data.captions import cannot_be_mirrored, classes_of, mirrored, mirrored_ids, without_classes
from segcn.data.dataset import read_control_mask
from segcn.data.masks import colorize, read_mask, write_mask
from segcn.data.metadata import Record, read_named_split
from segcn.data.palette import IGNORE, Palette
from segcn.generate.config import LayoutsConfig
from segcn.models.mask_diffusion import MaskDiffusionConfig, draw_masks, mask_denoiser_of, shrink
from segcn.utils import io, rng
from segcn.utils.errors import UserError
from segcn.utils.progress import Progress

SETTINGS, RECORDS, RESULTS, FIGURE = "layouts_config.json", "layouts.jsonl", "layouts.json", "layouts.png"
ROWS = 2048  # of a larger data set, so many are drawn once and used
MEASURED = 1024  # masks of each set that distances are measured on
BATCH = 32  # layouts that the network draws at once
REDRAWN = 8  # draws of a layout at most
BORDER = 0.005  # share of a mask's boundary from which on two classes count as neighbors
SMALLEST = 0.001  # share of a mask's pixels from which on connected pixels count as an object
LARGEST = 0.1  # share up to which they do
INSIDE = 0.5  # share of a class's objects that touch no side of the image, from which on it is a thing
APART = 0.25  # total variation, up to which the surroundings of an object are like those of a real one
PLACES = 12  # tries for an object
STRETCH = 0.25  # of a row: each part becomes at most so much longer or shorter
MEANINGS = {
    "valid": "all neighbors occur in rows (rows: halves)",
    "valid_at_once": "  at the first draw",
    "shares": "energy distance to half of the rows: class shares",
    "neighbors": "  shares of the boundary by pair of classes",
    "pieces": "  objects of each class",
    "nearest": "agreement with the nearest row (median)",
    "copies": "more of it than 99 % of the rows have",
    "ratios": "mean absolute error of --ratios",
}
CLOSE = 0.02  # mean error of --ratios from which on a layout is not drawn again


class Piece(NamedTuple):
    """Connected pixels of a class, and the corner of their box in the mask."""

    id: int
    top: int
    left: int
    shape: np.ndarray  # bool [h, w]
    inside: bool  # an object: not large, and touching no side of the mask

    @property
    def foot(self) -> tuple[int, float]:
        """The row below it, and its central column."""
        return self.top + len(self.shape), self.left + self.shape.shape[1] / 2


class MaskObject(NamedTuple):
    """A whole object of a thing class, and the states around it."""

    piece: Piece
    around: np.ndarray  # float [2, S]: their shares of the pixels right below it, and of those at its other sides


class Layout(NamedTuple):
    """A mask, uint8 [R, R], its captions, and the row whose background, or class shares, it has."""

    mask: np.ndarray
    captions: tuple[str, ...]
    row: int


class Counted(NamedTuple):
    """What is compared of a mask, or of several. A state is a class, or unlabelled where the rows have such pixels."""

    shares: np.ndarray  # [..., S]: of the pixels
    boundary: np.ndarray  # [..., 2 S S]: of the boundary, by the pair of states: above and below, then side by side
    pieces: np.ndarray  # [..., S]: how many there are


@dataclass(frozen=True)
class RealMasks:
    """The masks of the rows, and what holds of them."""

    masks: np.ndarray  # uint8 [N, R, R]
    records: Sequence[Record]
    palette: Palette
    states: np.ndarray  # uint8 [S]: the ids that occur, 255 among them
    state_of: np.ndarray  # uint8 [256]: the place of each in `states`
    mirror: np.ndarray | None  # uint8 [256]: the id of each class in a mirrored mask; None: masks are not mirrored
    counted: Counted
    neighbors: np.ndarray  # bool [2 S S]: pairs that share enough of the boundary of some mask
    things: list[int]  # ids of the classes whose objects are exchanged
    objects: list[list[MaskObject]]  # of each row

    def count(self, mask: np.ndarray, pieces: Sequence[Piece] | None = None) -> Counted:
        """What is compared of a mask, uint8 [R, R]."""
        return count_mask(self.state_of[mask], len(self.states), self.state_of, pieces or list(pieces_of(mask)))

    def foreign(self, boundary: np.ndarray) -> np.ndarray:
        """The share of the boundary of masks, [..., 2 S S], between classes that are neighbors in no row, [...]."""
        return np.where((boundary >= BORDER) & ~self.neighbors, boundary, 0).sum(-1)


def components(mask: np.ndarray) -> np.ndarray:
    """A number for each pixel, int64 [H, W], that is the same for pixels that are connected within their class."""
    numbers, parent = np.arange(mask.size).reshape(mask.shape), np.arange(mask.size)
    across, down = mask[:, 1:] == mask[:, :-1], mask[1:] == mask[:-1]
    one = np.concatenate([numbers[:, 1:][across], numbers[1:][down]])
    other = np.concatenate([numbers[:, :-1][across], numbers[:-1][down]])
    while len(one):
        one, other = parent[one], parent[other]
        one, other = one[one != other], other[one != other]
        np.minimum.at(parent, np.maximum(one, other), np.minimum(one, other))
        while (parent != (above := parent[parent])).any():
            parent = above
    return parent.reshape(mask.shape)


def pieces_of(mask: np.ndarray) -> Iterator[Piece]:
    """The connected pixels of each class, but for specks."""
    numbers, (height, width) = components(mask), mask.shape
    found, sizes = np.unique(numbers, return_counts=True)
    for number, size in zip(found, sizes, strict=True):
        if size >= SMALLEST * mask.size and (id := int(mask.flat[number])) != IGNORE:
            rows, columns = np.nonzero(numbers == number)
            (top, left), (bottom, right) = (rows.min(), columns.min()), (rows.max() + 1, columns.max() + 1)
            inside = size <= LARGEST * mask.size and min(top, left, height - bottom, width - right) > 0
            yield Piece(id, int(top), int(left), numbers[top:bottom, left:right] == number, bool(inside))


def count_mask(ids: np.ndarray, states: int, state_of: np.ndarray, pieces: Sequence[Piece]) -> Counted:
    """Count states, uint8 [R, R], and the pieces of the mask."""
    above, below, left, right = (part.astype(int) for part in (ids[:-1], ids[1:], ids[:, :-1], ids[:, 1:]))
    vertical = (above * states + below)[above != below]
    beside = (np.minimum(left, right) * states + np.maximum(left, right))[left != right]
    boundary = np.bincount(np.concatenate([vertical, beside + states**2]), minlength=2 * states**2)
    pieces_of_state = np.bincount([state_of[piece.id] for piece in pieces], minlength=states)
    shares = np.bincount(ids.ravel(), minlength=states) / ids.size
    return Counted(shares, (boundary / max(1, boundary.sum())).astype(np.float32), pieces_of_state)


def around(states: np.ndarray, shape: np.ndarray, top: int, left: int, count: int) -> np.ndarray:
    """The shares of the states, uint8 [R, R], below a shape inside of the mask and at its other sides, [2, S]."""
    own = np.pad(shape, 1)
    below = np.roll(own, 1, 0) & ~own
    sides = (np.roll(own, -1, 0) | np.roll(own, 1, 1) | np.roll(own, -1, 1)) & ~own & ~below
    window = states[top - 1 : top + len(own) - 1, left - 1 : left + own.shape[1] - 1]
    return np.stack([np.bincount(window[part], minlength=count) / part.sum() for part in (below, sides)])


def read_real_masks(config: LayoutsConfig, log: Callable = print) -> RealMasks:
    """Read the rows; UserError where a class of --things is unknown, or no class has objects."""
    split = read_named_split(config.dataset_name, config.split)
    records = [split[row] for row in sorted(rng.permutation(len(split), "layouts", config.seed, "rows")[:ROWS])]
    side, progress = config.resolution or min(read_mask(records[0].mask, split.palette).shape), None
    masks = np.stack([read_control_mask(one.mask, split.palette, side, config.fit) for one in records])
    states = np.unique(masks)
    state_of, count, progress = np.zeros(256, np.uint8), len(states), Progress("rows counted", len(masks), log)
    state_of[states] = np.arange(count)
    pieces, counted = [], []
    for done, mask in enumerate(masks, start=1):
        pieces.append(list(pieces_of(mask)))
        counted.append(count_mask(state_of[mask], count, state_of, pieces[-1]))
        progress(done)
    whole = Counted(*map(np.stack, zip(*counted, strict=True)))
    things = _ids_of(config.things.split(","), split.palette, states, "--things") if config.things else None
    if things is None:
        inside = np.bincount([state_of[one.id] for row in pieces for one in row if one.inside], minlength=count)
        things = states[(inside > 0) & (inside >= INSIDE * whole.pieces.sum(0))].tolist()
    if config.method == "recombine":
        names = [label.name for label in split.palette.labels if label.id in things]
        log(f"layouts: things are {', '.join(names) or 'none'}; --things names others")
    objects = []
    for mask, row in zip(masks, pieces, strict=True):
        owned = [one for one in row if one.inside and one.id in things]
        found = [MaskObject(one, around(state_of[mask], one.shape, one.top, one.left, count)) for one in owned]
        objects.append([one for one in found if one.around[:, state_of[things]].sum(1).max() <= APART])  # not cut off
    mirror = mirrored_ids(split.palette)
    mirror = mirror if mirror is not None and np.isin(mirror[states], states).all() else None
    neighbors = (whole.boundary >= BORDER).any(0)
    return RealMasks(masks, records, split.palette, states, state_of, mirror, whole, neighbors, things, objects)


def _ids_of(names: Sequence[str], palette: Palette, states: np.ndarray, flag: str) -> list[int]:
    """The ids of classes; UserError for one that no row shows."""
    ids = {label.name: label.id for label in palette.labels if label.id in states and label.id != IGNORE}
    for name in names:
        if name not in ids:
            raise UserError(f"{flag}: expected classes of the rows, {', '.join(ids)}, found {name!r}")
    return [ids[name] for name in names]


def read_ratios(text: str, real: RealMasks) -> dict[int, float]:
    """--ratios as the share of each state; UserError for another form, for unknown classes, and above 1 in all."""
    try:
        asked = {
            name.strip(): float(share) for name, _, share in (one.partition("=") for one in text.split(",") if one)
        }
    except ValueError:
        raise UserError(f"--ratios: expected shares of classes such as road=0.2,house=0.1, found {text!r}") from None
    if not all(0 <= share <= 1 for share in asked.values()) or sum(asked.values()) > 1:
        raise UserError(f"--ratios: expected shares from 0 to 1, and at most 1 in all, found {text!r}")
    ids = _ids_of(list(asked), real.palette, real.states, "--ratios")
    return dict(zip(real.state_of[ids].tolist(), asked.values(), strict=True))


def missed(shares: np.ndarray, ratios: dict[int, float]) -> np.ndarray:
    """The mean absolute error of the shares that were asked for, [...] of shares [..., S]; 0 where none were."""
    return np.abs(shares[..., list(ratios)] - list(ratios.values())).sum(-1) / max(1, len(ratios))


# --- Recombine


def recombine(real: RealMasks, row: int, other: int, *key: str | int) -> Layout:
    """A row stretched, with half of its own objects and half of those of another row, each where one stood before.

    An object takes the place of any object of its class, and a part of its size, where below and around it the mask
    looks as around a real one. What is removed is filled by the nearest of the background around it.
    """
    captions, things = real.records[row].captions, np.isin(np.arange(256), real.things)
    mask = _stretched(real.masks[row], *key)
    flips = real.mirror is not None and not any(map(cannot_be_mirrored, captions))
    if flips and rng.uniform(*key, "flip") < 0.5:
        assert real.mirror is not None
        mask, captions = real.mirror[mask[:, ::-1]], tuple(map(mirrored, captions))
    changed = False
    for number, piece in enumerate(pieces_of(mask)):
        if piece.id in real.things and rng.uniform(*key, "remove", number) < 0.5:
            changed |= _removed(mask, piece, things)
    most = real.counted.pieces.max(0)
    for number, one in enumerate(sorted(real.objects[other], key=lambda one: one.piece.foot)):
        if rng.uniform(*key, "paste", number) < 0.5:
            for place in range(PLACES):
                changed |= (pasted := _pasted(real, mask, one.piece, most, things, *key, number, place))
                if pasted:
                    break
    if changed:
        captions = captions_without(captions, mask, real.palette)
    return Layout(np.ascontiguousarray(mask), captions, row)


def captions_without(captions: Sequence[str], mask: np.ndarray, palette: Palette) -> tuple[str, ...]:
    """The captions without their classes, which the mask does not have any more; the mask's classes where all is cut."""
    cut = (without_classes(caption, palette).strip() for caption in captions)
    return tuple(dict.fromkeys(caption or classes_of(mask, palette) for caption in cut))


def _stretched(mask: np.ndarray, *key: str | int) -> np.ndarray:
    """The mask, of which each quarter of the rows and of the columns is stretched or squeezed: neighbors stay so."""
    side, places = len(mask), []
    for axis in range(2):
        parts = [rng.between(1 - STRETCH, 1 + STRETCH, *key, "stretch", axis, part) for part in range(4)]
        knots = np.concatenate([[0], np.cumsum(parts) / sum(parts)]) * side
        places.append(np.interp(np.arange(side) + 0.5, np.linspace(0, side, 5), knots).astype(int))
    return mask[np.ix_(*places)]


def _removed(mask: np.ndarray, piece: Piece, things: np.ndarray) -> bool:
    """Fill an object by the nearest background at its border, in place; False where there is none."""
    own = np.zeros(mask.shape, bool)
    own[piece.top : piece.top + len(piece.shape), piece.left : piece.left + piece.shape.shape[1]] = piece.shape
    grown = np.pad(own, 1)
    ring = (grown[2:, 1:-1] | grown[:-2, 1:-1] | grown[1:-1, 2:] | grown[1:-1, :-2]) & ~own & ~things[mask]
    if not ring.any():
        return False
    holes, edges = np.argwhere(own), np.argwhere(ring)
    nearest = ((holes[:, None] - edges) ** 2 @ [2, 1]).argmin(1)  # what is beside it counts more than what is above
    mask[own] = mask[ring][nearest]
    return True


def _pasted(
    real: RealMasks, mask: np.ndarray, piece: Piece, most: np.ndarray, things: np.ndarray, *key: str | int
) -> bool:
    """Put an object in place of a real one of its class, in place; False where it would look as no real one does."""
    same = [one for row in real.objects for one in row if one.piece.id == piece.id]
    place = same[rng.integer(len(same), *key, "place")].piece
    scale = np.sqrt(place.shape.sum() / piece.shape.sum()).clip(0.8, 1.25)
    height, width = (max(1, round(side * scale)) for side in piece.shape.shape)
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int)
                     for new, old in zip((height, width), piece.shape.shape, strict=True))  # fmt: skip
    shape, (bottom, center) = piece.shape[np.ix_(rows, columns)], place.foot
    if real.mirror is not None and real.mirror[piece.id] == piece.id:
        shape = shape[:, ::-1] if rng.uniform(*key, "flip") < 0.5 else shape
        center = len(mask) - center if rng.uniform(*key, "side") < 0.5 else center
    top, left = bottom - height, round(center - width / 2)
    if min(top, left, len(mask) - bottom, len(mask) - left - width) < 1:
        return False
    below, covered = around(real.state_of[mask], shape, top, left, len(real.states)), mask[top:bottom, left:][:, :width]
    apart = np.abs(np.stack([one.around for one in same]) - below).sum(-1).max(-1).min() / 2
    new = np.where(shape, np.uint8(piece.id), covered)
    if apart > APART or things[covered[shape]].mean() > APART:
        return False
    before = covered.copy()
    covered[:] = new
    if (real.count(mask).pieces > most).any():
        covered[:] = before
        return False
    return True


# --- The command


def make_layouts(config: LayoutsConfig, log: Callable = print) -> str:
    """Write masks, their captions, palette.json, layouts.json and layouts.png; the table of measurements.

    UserError where the rows have no objects, and for a folder that holds something else.
    """
    out = Path(config.output_dir)
    if out.exists() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise UserError(f"--output_dir {out} is not empty and was not written by segcn layouts: choose another.")
    io.lock(out, log, "makes layouts", "rerunning the same command resumes")
    try:
        real = read_real_masks(config, log)
        ratios = read_ratios(config.ratios, real)
        if config.method == "recombine" and not any(real.objects):
            raise UserError(f"{config.dataset_name}: no class has objects inside the masks: --method learned")
        settings = asdict(config) | {"rows": read_named_split(config.dataset_name, config.split).fingerprint}
        free = frozenset({"dataset_name", "output_dir", "allow_symlinks"})
        io.same_settings(out / SETTINGS, settings, free, log=log, what="set of layouts")
        io.write_whole(out / "palette.json", real.palette.save)
        records = _write_layouts(config, real, ratios, out, log)
        layouts = np.stack([read_mask(out / _name(number), real.palette) for number in range(config.count)])
        return _measure(real, layouts, records, ratios, out)
    finally:
        io.release()


def _name(number: int) -> str:
    return f"masks/{number:06d}.png"


def _write_layouts(
    config: LayoutsConfig, real: RealMasks, ratios: dict[int, float], out: Path, log: Callable
) -> list[dict[str, Any]]:
    """Draw and write the layouts that are missing; the records of all, in order."""
    lines = (out / RECORDS).read_text().splitlines() if (out / RECORDS).is_file() else []
    known = {one["layout"]: one for one in map(json.loads, (line for line in lines if line.endswith("}")))}
    known = {number: one for number, one in known.items() if (out / _name(number)).is_file()}
    draw: Callable | None = None
    progress = Progress("layouts", config.count, log, start=len(known))
    for first in range(0, config.count, BATCH):
        missing = [number for number in range(first, min(first + BATCH, config.count)) if number not in known]
        if missing:
            draw = draw or _drawing(config, real, ratios, log)
            drawn = draw_valid(real, ratios, draw, range(first, first + BATCH), missing)
            for number in missing:
                layout, record = drawn[number]
                path, texts = out / _name(number), [" ".join(caption.split()) for caption in layout.captions]
                path.parent.mkdir(exist_ok=True)
                io.write_text(path.with_suffix(".txt"), "\n".join(texts) + "\n")
                io.write_whole(path, lambda file, layout=layout: write_mask(file, layout.mask, real.palette))
                with (out / RECORDS).open("a") as file:
                    file.write("\n" + json.dumps(record) + "\n")
                known[number] = record
            progress(len(known))
    return [known[number] for number in range(config.count)]


def _drawing(config: LayoutsConfig, real: RealMasks, ratios: dict[int, float], log: Callable) -> Callable:
    """A function (numbers of a batch, those that are needed, attempt) -> the layouts of these, or of the whole batch."""
    near = np.argsort(missed(real.counted.shares, ratios), kind="stable")  # the rows that are most like --ratios
    near = near[: max(8, len(near) // 16)] if ratios else near

    def row_of(*key: str | int) -> int:
        return int(near[rng.integer(len(near), *key)])

    if config.method == "recombine":
        keys = lambda number, attempt: ("layouts", config.seed, number, attempt)  # noqa: E731
        return lambda batch, needed, attempt: {
            number: recombine(real, row_of(*key, "row"), row_of(*key, "other"), *key)
            for number in needed
            if (key := keys(number, attempt))
        }
    settings = MaskDiffusionConfig(steps=config.max_train_steps, seed=config.seed)
    labels, cache = real.state_of[real.masks], Path(config.output_dir).absolute().parent / "cache"
    mirror = None if real.mirror is None else real.state_of[real.mirror[real.states]]
    denoiser = mask_denoiser_of(labels, len(real.states), mirror, settings, cache, log)
    side = shrink(labels[:1], len(real.states), settings.side).shape[-1]

    def learned(batch: range, needed: list[int], attempt: int) -> dict[int, Layout]:
        keys = [("layouts", config.seed, number, attempt) for number in batch]
        rows = [row_of(*key, "row") for key in keys]
        wanted = real.counted.shares[rows]
        given = list(ratios)
        wanted[:, given] = 0
        wanted *= (1 - sum(ratios.values())) / wanted.sum(1, keepdims=True).clip(1e-6)
        wanted[:, given] = list(ratios.values())
        masks = real.states[draw_masks(denoiser, wanted, keys, side, real.masks.shape[-1])]
        texts = [
            captions_without(real.records[row].captions, one, real.palette)
            for row, one in zip(rows, masks, strict=True)
        ]
        return dict(zip(batch, map(Layout, masks, texts, rows), strict=True))

    return learned


def draw_valid(
    real: RealMasks, ratios: dict[int, float], draw: Callable, batch: range, needed: Sequence[int]
) -> dict[int, tuple[Layout, dict[str, Any]]]:
    """Layouts and their records: drawn again while classes touch that never do in the rows, or --ratios is missed."""
    best: dict[int, tuple[tuple[float, float], Layout, int]] = {}
    valid = {}
    for attempt in range(REDRAWN):
        left = [number for number in needed if number not in best or max(best[number][0]) > 0]
        drawn = draw(batch, left, attempt) if left else {}
        for number in left:
            counted = real.count(drawn[number].mask)
            score = float(real.foreign(counted.boundary)), max(0.0, float(missed(counted.shares, ratios)) - CLOSE)
            valid.setdefault(number, score[0] == 0)
            if number not in best or score < best[number][0]:
                best[number] = score, drawn[number], attempt
    return {number: (layout, {"layout": number, "row": real.records[layout.row].row, "attempt": attempt,
                              "valid_at_once": valid[number]})
            for number, (_, layout, attempt) in best.items()}  # fmt: skip


# --- How real are they?


def energy_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Energy distance (Székely and Rizzo 2013) of two sets of vectors, [N, D] and [M, D]: 0 where they are the same."""
    x, y = (torch.from_numpy(part.reshape(len(part), -1)).double() for part in (one, other))
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def nearest_masks(masks: np.ndarray, real: RealMasks, same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The share of pixels in which each mask [N, R, R] agrees with the row most like it, mirrored or not, and its row.

    same: the masks are the rows, which are not compared with themselves. About 64 px a side are compared.
    """
    step, flips = max(1, masks.shape[-1] // 64), real.mirror is not None
    rows, agreements = real.masks[:MEASURED, ::step, ::step], []
    for number, mask in enumerate(masks[:, ::step, ::step]):
        views = [mask, real.mirror[mask[:, ::-1]]] if flips and real.mirror is not None else [mask]
        found = np.max([(rows == view).mean((1, 2)) for view in views], axis=0)
        if same:
            found[number] = 0
        agreements.append(found)
    return np.max(agreements, axis=1), np.argmax(agreements, axis=1)


def _measure(
    real: RealMasks, layouts: np.ndarray, records: Sequence[dict[str, Any]], ratios: dict[int, float], out: Path
) -> str:
    """Write layouts.json and layouts.png; the same numbers as a table."""
    counted = Counted(*map(np.stack, zip(*map(real.count, layouts), strict=True)))
    size = max(1, min(len(layouts), len(real.masks) // 2, MEASURED))
    order = rng.permutation(len(real.masks), "layouts", "halves")
    half, other = order[:size], order[-size:]
    agreement, nearest = nearest_masks(layouts, real)
    usual = np.quantile(nearest_masks(real.masks[:MEASURED], real, True)[0], [0.5, 0.99])
    seen = (real.counted.boundary[half] >= BORDER).any(0)
    unseen = (real.counted.boundary[other] >= BORDER) & ~seen
    found: dict[str, Any] = {
        "layouts": len(layouts),
        "valid": [float((real.foreign(counted.boundary) == 0).mean()), float((~unseen.any(1)).mean())],
        "valid_at_once": [float(np.mean([one["valid_at_once"] for one in records])), None],
    }
    for name, new, old in zip(("shares", "neighbors", "pieces"), counted, real.counted, strict=True):
        found[name] = [energy_distance(new[:size], old[half]), energy_distance(old[other], old[half])]
    found["nearest"] = [float(np.median(agreement)), float(usual[0])]
    found["copies"] = [float((agreement > usual[1]).mean()), 0.01]
    if ratios:
        found["ratios"] = [
            float(missed(counted.shares, ratios).mean()),
            float(missed(real.counted.shares, ratios).mean()),
        ]
    io.write_text(out / RESULTS, json.dumps(found, indent=1) + "\n")
    picked = [range(first, min(first + 8, 24, len(layouts))) for first in range(0, min(24, len(layouts)), 8)]
    rows = [colorize(masks, real.palette) for line in picked
            for masks in (layouts[list(line)], real.masks[nearest[list(line)]])]  # fmt: skip
    with matplotlib.rc_context(visualize.STYLE):
        figure = visualize.grid(rows, left=["layout", "nearest row"] * len(picked), width=1.0)
        io.write_whole(out / FIGURE, lambda path: figure.savefig(path, format="png", bbox_inches="tight"))
    lines = [f"{'':56}{'layouts':>9}{'rows':>9}"]
    lines += [f"{MEANINGS[name]:56}" + "".join(f"{'' if one is None else f'{one:.3f}':>9}" for one in values)
              for name, values in found.items() if name in MEANINGS]  # fmt: skip
    return "\n".join([*lines, f"{len(layouts)} layouts in {out}: see {FIGURE}"])
