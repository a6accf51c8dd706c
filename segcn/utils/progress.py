"""Progress of long work: a bar in a terminal and in a notebook, a line now and then in a log."""

import os
import sys
import time
from collections.abc import Callable

from tqdm import tqdm


class Progress:
    """Call it with the number done so far; in a log it prints at most one line in `every` seconds.

    log: where the lines go; only with `print` a bar can replace them.
    """

    def __init__(self, what: str, total: int, log: Callable[[str], None] = print, every: float = 10.0):
        self.what, self.total, self.log, self.every = what, total, log, every
        self.began = self.logged = time.monotonic()
        ipython = sys.modules.get("IPython")
        notebook = ipython is not None and ipython.get_ipython() is not None  # it shows tqdm's text bar, too
        watched = (notebook or sys.stdout.isatty()) and not os.environ.get("TQDM_DISABLE")
        shown = log is print and total > 0 and watched
        self.bar = tqdm(desc=what, total=total, leave=False, delay=1, file=sys.stdout) if shown else None

    def __call__(self, done: int) -> None:
        """Show "encoded 32 of 128, 2.1 per second" when it is time."""
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
            if done >= self.total:
                self.bar.close()
            return
        now = time.monotonic()
        if now - self.logged > self.every:
            self.logged = now
            self.log(f"  {self.what} {done} of {self.total}, {done / (now - self.began):.1f} per second")


def clock(seconds: float) -> str:
    """ "3:05 min"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
