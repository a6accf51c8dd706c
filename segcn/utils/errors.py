"""The one exception for mistakes that a user can mend."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in the data, the files or the settings: names what, where, what was expected and how to mend it."""


def refuse_failed(problems: Sequence[str], count: int, what: str = "rows", mend: str = "") -> None:
    """UserError with the first of the problems, how many more of `count` fail, and what mends them; none: nothing."""
    if problems:
        more = f"; {len(problems) - 1} more of {count} {what} fail" if len(problems) > 1 else ""
        raise UserError(problems[0] + more + mend)
