"""Progress of long work: a bar in a terminal and in a notebook, a line now and then in a log, and no long silence."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO

from tqdm import tqdm

EVERY = 10.0  # seconds between two lines in a log
SILENCE = 15.0  # seconds without any output, after which a command says that it is still working
WAITING = threading.Event()  # set by a command that waits for a person: then silence is right


class Progress:
    """Call it with the number done so far: count, rate and time left, as a bar, or at most one line in `every` seconds.

    log: where the lines go; a bar can replace them where it is `print`, or has an attribute `shows_bars`. file: for
    both, in place of standard output. start: how many were done before. total: 0 where it is not known.
    """

    now: "Progress | None" = None  # the work that was counted last

    def __init__(
        self,
        what: str,
        total: int,
        log: Callable[[str], None] = print,
        every: float = EVERY,
        file: TextIO | None = None,
        start: int = 0,
    ):
        self.what, self.total, self.start, self.done, self.every = what, total, start, start, every
        self.log = partial(print, file=file, flush=True) if file else log
        self.began = self.logged = time.monotonic()
        ipython = sys.modules.get("IPython")
        notebook = ipython is not None and ipython.get_ipython() is not None  # it shows tqdm's text bar, too
        out = file or sys.stdout
        interactive = (notebook or out.isatty()) and not os.environ.get("TQDM_DISABLE")
        shown = (log is print or hasattr(log, "shows_bars")) and total > start and interactive
        self.bar = tqdm(desc=what, total=total, initial=start, leave=False, delay=1, file=out) if shown else None
        Progress.now = self

    def __call__(self, done: int, note: Callable[[], str] | None = None) -> None:
        """Show "encoded 32 of 128, 2.1 per second, 46 s left" when it is time; note: called for what follows."""
        Progress.now, self.done = (None if done == self.total else self), done
        if self.bar is not None:
            if note is not None and done % 10 == 0:
                self.bar.set_postfix_str(note(), refresh=False)
            self.bar.update(done - self.bar.n)
            if done >= self.total:
                self.bar.close()
            return
        now = time.monotonic()
        if now - self.logged > self.every:
            self.logged = now
            self.log(f"  {self.line(now - self.began)}" + (f", {note()}" if note is not None else ""))

    def line(self, seconds: float) -> str:
        """Count, rate and time left, after so many seconds."""
        new = self.done - self.start
        if not new or not seconds:
            return self.count
        rate, left = new / seconds, (self.total - self.done) * seconds / new
        pace = f"{rate:.1f} per second" if rate >= 1 else f"{1 / rate:.1f} s each"
        return f"{self.count}, {pace}" + (f", {clock(left)} left" if self.total else "")

    @property
    def count(self) -> str:
        return f"{self.what} {self.done}" + (f" of {self.total}" if self.total else "")

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self.bar is not None and not self.bar.disable:
            self.bar.write(text, file=self.bar.fp)
        else:
            print(text, flush=True)
        self.logged = time.monotonic()


def clock(seconds: float) -> str:
    """ "45 s", or "3:05 min"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min" if seconds >= 60 else f"{int(seconds)} s"


@contextmanager
def never_silent(after: float = SILENCE) -> Iterator[None]:
    """While it lasts, say on standard error that a command still works where it printed nothing for so many seconds.

    Of several processes only the first one does; none where `WAITING` is set.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    began, ended = time.monotonic(), threading.Event()
    out, err = sys.stdout, sys.stderr
    streams = sys.stdout, sys.stderr = _Timed(out), _Timed(err)

    def say() -> None:
        said = began
        while not ended.wait(after / 10):
            now = time.monotonic()
            if now - max(said, *(stream.written for stream in streams)) > after and not WAITING.is_set():
                said, work = now, Progress.now
                if work is not None and work.bar is not None:
                    work.bar.refresh()
                else:
                    what = f"{work.count}, " if work is not None else ""
                    print(f"  {what}still working after {clock(now - began)}", file=err, flush=True)

    threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        sys.stdout, sys.stderr = out, err


class _Timed:
    """A stream that knows when something was last written to it."""

    def __init__(self, stream: Any):
        self._stream, self.written = stream, time.monotonic()

    def write(self, text: str) -> int:
        self.written = time.monotonic()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
