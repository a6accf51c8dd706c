"""The one exception for mistakes that a user can fix."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in the data, the files or the settings: says what, where, what was expected and how to fix it."""


def refuse_failed(problems: Sequence[str], count: int, what: str = "rows", fix: str = "") -> None:
    """UserError with the first of the problems, how many more of `count` there are, and what fixes them."""
    if problems:
        more = f"; {len(problems) - 1} more of {count} {what} fail" if len(problems) > 1 else ""
        raise UserError(problems[0] + more + fix)
