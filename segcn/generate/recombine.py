"""New masks from real ones: the masks of the rows with what holds of them, and rows whose objects are exchanged."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from segcn.data.captions import cannot_be_mirrored, classes_of, mirrored, mirrored_ids, without_classes
from segcn.data.dataset import read_framed_mask
from segcn.data.masks import read_mask, resize_mask
from segcn.data.metadata import Split, read_named_split
from segcn.data.palette import IGNORE, Palette
from segcn.generate.config import LayoutsConfig
from segcn.utils import rng
from segcn.utils.errors import UserError
from segcn.utils.progress import Progress

USED_ROWS = 2048  # of a larger data set, so many are drawn once and used
BORDER = 0.005  # share of a mask's boundary from which on two classes count as neighbors
SPECK = 0.001  # share of a mask's pixels from which on connected pixels count as a piece
LARGEST = 0.1  # share up to which they may be an object
INSIDE = 0.4  # share of a class's pieces that are objects, from which on it is a thing
UNLIKE = 0.25  # total variation up to which the surroundings of an object are like those of a real one
PLACE_TRIES = 12  # tries for an object
STRETCH = 0.3  # each quarter of a row becomes at most so much longer or shorter


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


class Layout(NamedTuple):
    """A mask, uint8 [R, R], its captions, and the row whose background it has."""

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
    split: Split  # the rows, in the same order
    states: np.ndarray  # uint8 [S]: the ids that occur, 255 among them
    state_of: np.ndarray  # uint8 [256]: the place of each in `states`
    mirror: np.ndarray | None  # uint8 [256]: the id of each class in a mirrored mask; None: masks are not mirrored
    counted: Counted
    neighbors: np.ndarray  # bool [2 S S]: pairs that share enough of the boundary of some mask
    things: list[int]  # ids of the classes whose objects are exchanged
    objects: list[list[Piece]]  # of each row: whole ones of these classes
    places: dict[
        int, tuple[list[Piece], np.ndarray]
    ]  # of each thing: all its objects, and what is around them [n, 2, S]

    def count(self, mask: np.ndarray) -> Counted:
        """What is compared of a mask, uint8 [R, R]."""
        return count_mask(mask, self.state_of, len(self.states), list(pieces_of(mask)))

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
        if size >= SPECK * mask.size and (id := int(mask.flat[number])) != IGNORE:
            rows, columns = np.nonzero(numbers == number)
            (top, left), (bottom, right) = (rows.min(), columns.min()), (rows.max() + 1, columns.max() + 1)
            inside = size <= LARGEST * mask.size and min(top, left, height - bottom, width - right) > 0
            yield Piece(id, int(top), int(left), numbers[top:bottom, left:right] == number, bool(inside))


def count_mask(mask: np.ndarray, state_of: np.ndarray, states: int, pieces: Sequence[Piece]) -> Counted:
    """What is compared of a mask, uint8 [R, R], and its pieces. state_of: uint8 [256], the state of each id."""
    ids = state_of[mask]
    above, below, left, right = (part.astype(int) for part in (ids[:-1], ids[1:], ids[:, :-1], ids[:, 1:]))
    vertical = (above * states + below)[above != below]
    beside = (np.minimum(left, right) * states + np.maximum(left, right))[left != right]
    boundary = np.bincount(np.concatenate([vertical, beside + states**2]), minlength=2 * states**2)
    pieces_of_state = np.bincount([state_of[piece.id] for piece in pieces], minlength=states)
    shares = np.bincount(ids.ravel(), minlength=states) / ids.size
    return Counted(shares, (boundary / max(1, boundary.sum())).astype(np.float32), pieces_of_state)


def around(states: np.ndarray, piece: Piece, count: int) -> np.ndarray:
    """The shares of the states, uint8 [R, R], below a piece inside of the mask and at its other sides, [2, S]."""
    own = np.pad(piece.shape, 1)
    below = np.roll(own, 1, 0) & ~own
    sides = (np.roll(own, -1, 0) | np.roll(own, 1, 1) | np.roll(own, -1, 1)) & ~own & ~below
    window = states[piece.top - 1 :, piece.left - 1 :][: len(own), : own.shape[1]]
    return np.stack([np.bincount(window[part], minlength=count) / max(1, part.sum()) for part in (below, sides)])


def read_real_masks(config: LayoutsConfig, log: Callable = print) -> RealMasks:
    """Read the rows; UserError where a class of --things is unknown, or no class has objects."""
    split = read_named_split(config.dataset_name, config.split)
    chosen = sorted(rng.permutation(len(split), "layouts", config.seed, "rows")[:USED_ROWS])
    split = replace(split, records=tuple(split[row] for row in chosen))
    side = config.resolution or min(read_mask(split[0].mask, split.palette).shape)
    masks = np.stack([read_framed_mask(one.mask, split.palette, side, config.fit)[0] for one in split.records])
    states, state_of = np.unique(masks), np.zeros(256, np.uint8)
    state_of[states], count, progress = np.arange(len(states)), len(states), Progress("rows counted", len(masks), log)
    pieces, counted = [], []
    for done, mask in enumerate(masks, start=1):
        pieces.append(list(pieces_of(mask)))
        counted.append(count_mask(mask, state_of, count, pieces[-1]))
        progress(done)
    whole = Counted(*map(np.stack, zip(*counted, strict=True)))
    things = class_ids(config.things.split(","), split.palette, states, "--things") if config.things else None
    if things is None:
        inside = np.bincount([state_of[one.id] for row in pieces for one in row if one.inside], minlength=count)
        things = states[(inside > 0) & (inside >= INSIDE * whole.pieces.sum(0))].tolist()
    names = [label.name for label in split.palette.labels if label.id in things]
    log(f"layouts: things are {', '.join(names) or 'none'}; --things names others")
    objects: list[list[Piece]] = [[] for _ in masks]
    places: dict[int, tuple[list, list]] = {}
    for mask, row, whole_ones in zip(masks, pieces, objects, strict=True):
        for one in (one for one in row if one.inside and one.id in things):
            beside = around(state_of[mask], one, count)
            if beside[:, state_of[things]].sum(1).max() <= UNLIKE:  # else another thing may cover a part of it
                whole_ones.append(one)
                for found, new in zip(places.setdefault(one.id, ([], [])), (one, beside), strict=True):
                    found.append(new)
    if not places:
        raise UserError(
            f"{config.dataset_name}: no class has objects inside the masks, so that none can be exchanged; segcn"
            " generate --augment_masks affine draws new layouts of such masks"
        )
    surroundings = {id: (found, np.stack(beside)) for id, (found, beside) in places.items()}
    mirror = mirrored_ids(split.palette)
    mirror = mirror if mirror is not None and np.isin(mirror[states], states).all() else None
    neighbors = np.any(whole.boundary >= BORDER, axis=0)
    return RealMasks(masks, split, states, state_of, mirror, whole, neighbors, things, objects, surroundings)


def class_ids(names: Sequence[str], palette: Palette, states: np.ndarray, flag: str) -> list[int]:
    """The ids of classes; UserError for one that no row shows."""
    ids = {label.name: label.id for label in palette.labels if label.id in states and label.id != IGNORE}
    for name in names:
        if name not in ids:
            raise UserError(f"{flag}: expected classes of the rows, {', '.join(ids)}, found {name!r}")
    return [ids[name] for name in names]


def recombine(real: RealMasks, row: int, other: int, *key: str | int) -> Layout:
    """A row stretched, with half of its own objects and half of those of another row, each where one was before.

    An object takes the place of any object of its class, and a part of its size, where below and around it the mask
    looks as around a real one. What is removed is filled by the nearest of the background around it.
    """
    captions, things = real.split[row].captions, np.isin(np.arange(256), real.things)
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
    for number, one in enumerate(sorted(real.objects[other], key=lambda one: one.foot)):
        if rng.uniform(*key, "paste", number) < 0.5:
            for place in range(PLACE_TRIES):
                changed |= (pasted := _pasted(real, mask, one, most, things, *key, number, place))
                if pasted:
                    break
    if changed:  # the classes named may not be true of the mask; its own where nothing else is left
        cut = (without_classes(caption, real.split.palette).strip() for caption in captions)
        captions = tuple(dict.fromkeys(caption or classes_of(mask, real.split.palette) for caption in cut))
    return Layout(np.ascontiguousarray(mask), captions, row)


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
    edges, labels = np.argwhere(ring), mask[ring]
    for hole in np.argwhere(own):
        mask[tuple(hole)] = labels[((hole - edges) ** 2 @ [2, 1]).argmin()]  # what is beside counts more than above
    return True


def _pasted(
    real: RealMasks, mask: np.ndarray, piece: Piece, most: np.ndarray, things: np.ndarray, *key: str | int
) -> bool:
    """Put an object in place of a real one of its class, in place; False where it would look as no real one does."""
    same, surroundings = real.places[piece.id]
    place = same[rng.integer(len(same), *key, "place")]
    scale = np.sqrt(place.shape.sum() / piece.shape.sum()).clip(0.8, 1.25)
    height, width = (max(1, round(side * scale)) for side in piece.shape.shape)
    shape, (bottom, center) = resize_mask(piece.shape.view(np.uint8), (height, width)).astype(bool), place.foot
    if real.mirror is not None and real.mirror[piece.id] == piece.id:
        shape = shape[:, ::-1] if rng.uniform(*key, "flip") < 0.5 else shape
        center = len(mask) - center if rng.uniform(*key, "side") < 0.5 else center
    moved = Piece(piece.id, bottom - height, round(center - width / 2), shape, True)
    if min(moved.top, moved.left, len(mask) - bottom, len(mask) - moved.left - width) < 1:
        return False
    covered = mask[moved.top : bottom, moved.left : moved.left + width]
    apart = np.abs(surroundings - around(real.state_of[mask], moved, len(real.states))).sum(-1).max(-1) / 2
    if apart.min() > UNLIKE or things[covered[shape]].mean() > UNLIKE:
        return False
    before = covered.copy()
    covered[shape] = piece.id
    fits = bool((real.count(mask).pieces <= most).all())
    if not fits:
        covered[:] = before
    return fits
