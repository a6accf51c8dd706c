"""How many augmented draws of each row the latent cache keeps, by what the run needs and the disk holds."""

import math
import shutil
from pathlib import Path

from segcn.errors import UserError
from segcn.latent_files import Layout

SPARE = 10**9  # bytes of the disk that stay free


def resolve_draws(
    asked: int | None, visits: float, draw_bytes: int, text_bytes: int, budget: float, free: int, there: int = 0
) -> int:
    """The number of draws K: as asked, else as many as the budget holds, and no more than each row has visits.

    draw_bytes: of one draw of all rows; budget: bytes for the draws; free: bytes on the disk; there: bytes of this
    cache that stand already. UserError where they do not fit, or not even one.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--cache_draws: expected 1 or more, found {asked}")
    space = there + max(0, free - SPARE) - text_bytes
    fits = int((space if asked else min(space, budget)) // draw_bytes)
    draws = asked or max(1, min(fits, math.ceil(visits)))
    if draws > fits:
        raise UserError(
            f"the latent cache needs {_gb(draws * draw_bytes)} for {draws} draw(s) of all rows, and {_gb(text_bytes)}"
            f" for text; found a budget of {_gb(budget)} for draws, and {_gb(max(0, free - SPARE) + there)} of disk;"
            " give more by --cache_budget_gb, another disk by --cache_dir, or encode in every step by --cache none"
        )
    return draws


def free_bytes(folder: Path) -> int:
    """Free space of the disk on which a folder stands or will stand."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def standing_bytes(folder: Path) -> int:
    """What the arrays of a cache take up already."""
    return sum(path.stat().st_size for path in folder.glob("*.npy"))


def announce(layout: Layout, captions: int, draws: int, visits: float, steps: int, folder: Path) -> str:
    """What the cache costs and how often each draw is seen, in one line."""
    size = f"{_gb(draws * layout.draw_bytes)}, and {_gb(layout.text_bytes(captions))} of text"
    times = f"each draw is seen {visits / draws:.1f} times in {steps} steps"
    return f"{draws} draw(s) of each row are cached in {folder}: {size}; {times}; --cache none draws anew each time."


def _gb(size: float) -> str:
    """Bytes in GB, or MB where they are few."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
