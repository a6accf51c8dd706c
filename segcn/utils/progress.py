"""Long work says how far it is: a bar on a terminal, lines that read well in a log and in a notebook."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm


class Progress:
    """Call it with the number done; away from a terminal it speaks at most every `every` seconds."""

    def __init__(self, what: str, total: int, log: Callable[[str], None] = print, every: float = 10.0):
        self.what, self.total, self.log, self.every = what, total, log, every
        self.began = self.spoke = time.monotonic()
        on_terminal = log is print and total and sys.stdout.isatty()
        self.bar = tqdm(desc=what, total=total, leave=False) if on_terminal else None

    def __call__(self, done: int) -> None:
        """Say "painted 32 of 128, 2.1 a second" when it is time."""
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
            if done == self.total:
                self.bar.close()
            return
        now = time.monotonic()
        if now - self.spoke > self.every:
            self.spoke = now
            self.log(f"  {self.what} {done} of {self.total}, {done / (now - self.began):.1f} a second")


def clock(seconds: float) -> str:
    """ "3:05 min"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
