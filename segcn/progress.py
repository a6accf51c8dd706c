"""Long work says how far it is, in lines that read well on a terminal, in a log and in a notebook."""

import time
from collections.abc import Callable


class Progress:
    """Call it with the number done; it speaks at most every `every` seconds."""

    def __init__(self, what: str, total: int, log: Callable[[str], None] = print, every: float = 10.0):
        self.what, self.total, self.log, self.every = what, total, log, every
        self.began = self.spoke = time.monotonic()

    def __call__(self, done: int) -> None:
        """Say "painted 32 of 128, 2.1 a second" when it is time."""
        now = time.monotonic()
        if now - self.spoke > self.every:
            self.spoke = now
            self.log(f"  {self.what} {done} of {self.total}, {done / (now - self.began):.1f} a second")
