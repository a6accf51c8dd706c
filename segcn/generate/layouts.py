"""`segcn layouts`: new masks made from those of a data set, for `segcn generate --controls`, and how real they are.

Layout i is a function of the seed, i and the rows alone, so a stopped command resumes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from segcn.data import visualize
from segcn.data.masks import colorize, read_mask, write_mask
from segcn.generate.config import LayoutsConfig
from segcn.generate.recombine import BORDER, Counted, Layout, RealMasks, class_ids, read_real_masks, recombine
from segcn.utils import io, rng
from segcn.utils.errors import UserError
from segcn.utils.progress import Progress

SETTINGS, LAYOUT_RECORDS, RESULTS, LAYOUT_SHEET = "layouts_config.json", "layouts.jsonl", "layouts.json", "layouts.png"
MEASURED = 1024  # masks of each set that distances are measured on
REDRAWN = 8  # draws of a layout at most
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


def make_layouts(config: LayoutsConfig, log: Callable = print) -> str:
    """Write masks, their captions, palette.json, layouts.json and layouts.png; the table of measurements.

    UserError where the rows have no objects, and for a folder that holds something else.
    """
    out = Path(config.output_dir)
    found = [path for path in out.iterdir() if path.name[0] != "."] if out.exists() else []
    if found and not (out / SETTINGS).is_file():
        raise UserError(f"--output_dir {out} is not empty and was not written by segcn layouts: choose another.")
    io.lock(out, log, "makes layouts", "rerunning the same command resumes")
    try:
        real = read_real_masks(config, log)
        ratios = read_ratios(config.ratios, real)
        settings = asdict(config) | {"rows": real.split.fingerprint}
        free = frozenset({"dataset_name", "output_dir", "allow_symlinks"})
        io.same_settings(out / SETTINGS, settings, free, log=log, what="set of layouts")
        io.write_whole(out / "palette.json", real.split.palette.save)
        records = _write_layouts(config, real, ratios, out, log)
        layouts = np.stack([read_mask(out / _name(number), real.split.palette) for number in range(config.count)])
        return _measure(real, layouts, records, ratios, out)
    finally:
        io.release()


def _name(number: int) -> str:
    return f"masks/{number:06d}.png"


def _write_layouts(
    config: LayoutsConfig, real: RealMasks, ratios: dict[int, float], out: Path, log: Callable
) -> list[dict[str, Any]]:
    """Draw and write the layouts that are missing; the records of all, in order."""
    lines = (out / LAYOUT_RECORDS).read_text().splitlines() if (out / LAYOUT_RECORDS).is_file() else []
    known = {one["layout"]: one for one in map(json.loads, (line for line in lines if line.endswith("}")))}
    known = {number: one for number, one in known.items() if (out / _name(number)).is_file()}
    near = np.argsort(missed(real.counted.shares, ratios), kind="stable")  # the rows that are most like --ratios
    near = near[: max(8, len(near) // 16)] if ratios else near
    progress = Progress("layouts", config.count, log, start=len(known))
    for number in range(config.count):
        if number in known:
            continue
        layout, record = draw_valid(real, ratios, near, config.seed, number)
        path, texts = out / _name(number), [" ".join(caption.split()) for caption in layout.captions]
        path.parent.mkdir(exist_ok=True)
        io.write_text(path.with_suffix(".txt"), "\n".join(texts) + "\n")
        io.write_whole(path, partial(write_mask, mask=layout.mask, palette=real.split.palette))
        with (out / LAYOUT_RECORDS).open("a") as file:
            file.write("\n" + json.dumps(record) + "\n")
        known[number] = record
        progress(len(known))
    return [known[number] for number in range(config.count)]


def draw_valid(
    real: RealMasks, ratios: dict[int, float], near: np.ndarray, seed: int, number: int
) -> tuple[Layout, dict[str, Any]]:
    """A layout of two of the rows `near` and its record; drawn again while neighbors are new or --ratios is missed."""
    best, valid_at_once = None, True
    for attempt in range(REDRAWN):
        key = "layouts", seed, number, attempt
        row, other = (int(near[rng.integer(len(near), *key, which)]) for which in ("row", "other"))
        layout = recombine(real, row, other, *key)
        counted = real.count(layout.mask)
        score = float(real.foreign(counted.boundary)), max(0.0, float(missed(counted.shares, ratios)) - CLOSE)
        valid_at_once &= attempt > 0 or score[0] == 0
        if best is None or score < best[0]:
            best = score, layout, attempt
        if max(score) == 0:
            break
    assert best
    _, layout, attempt = best
    return layout, {
        "layout": number, "row": real.split[layout.row].row, "attempt": attempt, "valid_at_once": valid_at_once,
    }  # fmt: skip


def read_ratios(text: str, real: RealMasks) -> dict[int, float]:
    """--ratios as the share of each state; UserError for another form, for unknown classes, and above 1 in all."""
    try:
        wanted = {
            name.strip(): float(share) for name, _, share in (one.partition("=") for one in text.split(",") if one)
        }
    except ValueError:
        raise UserError(f"--ratios: expected shares of classes such as road=0.2,house=0.1, found {text!r}") from None
    if not all(0 <= share <= 1 for share in wanted.values()) or sum(wanted.values()) > 1:
        raise UserError(f"--ratios: expected shares from 0 to 1, and at most 1 in all, found {text!r}")
    ids = class_ids(list(wanted), real.split.palette, real.states, "--ratios")
    return dict(zip(real.state_of[ids].tolist(), wanted.values(), strict=True))


def missed(shares: np.ndarray, ratios: dict[int, float]) -> np.ndarray:
    """The mean absolute error of the shares that --ratios requests, [...] of shares [..., S]; 0 where none were."""
    return np.abs(shares[..., list(ratios)] - list(ratios.values())).sum(-1) / max(1, len(ratios))


# --- How real are they?


def energy_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Energy distance (Székely and Rizzo 2013) of two sets of vectors, [N, D] and [M, D]: 0 where they are the same."""
    used = one.any(0) | other.any(0)
    x, y = (torch.from_numpy(part[:, used]).double() for part in (one, other))
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def nearest_masks(masks: np.ndarray, real: RealMasks, same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The share of pixels in which each mask [N, R, R] agrees with the row most like it, mirrored or not, and its row.

    same: the masks are the rows, which are not compared with themselves. They are compared at about 64 px.
    """
    step, agreements = max(1, masks.shape[-1] // 64), []
    rows = real.masks[:MEASURED, ::step, ::step]
    for number, mask in enumerate(masks[:, ::step, ::step]):
        views = [mask] if real.mirror is None else [mask, real.mirror[mask[:, ::-1]]]
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
    middle = max(1, len(order) // 2)
    seen = (real.counted.boundary[order[:middle]] >= BORDER).any(0)
    unseen = (real.counted.boundary[order[-middle:]] >= BORDER) & ~seen
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
    rows = [colorize(masks, real.split.palette) for line in picked
            for masks in (layouts[list(line)], real.masks[nearest[list(line)]])]  # fmt: skip
    with matplotlib.rc_context(visualize.STYLE):
        figure = visualize.grid(rows, left=["layout", "nearest row"] * len(picked), width=1.0)
        io.write_whole(out / LAYOUT_SHEET, lambda path: figure.savefig(path, format="png", bbox_inches="tight"))
    lines = [f"{'':56}{'layouts':>9}{'rows':>9}"]
    lines += [f"{MEANINGS[name]:56}" + "".join(f"{'' if one is None else f'{one:.3f}':>9}" for one in values)
              for name, values in found.items() if name in MEANINGS]  # fmt: skip
    return "\n".join([*lines, f"{len(layouts)} layouts in {out}: see {LAYOUT_SHEET}"])
