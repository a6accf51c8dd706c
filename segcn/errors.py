"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """A mistake in the data, the files or the settings: names what, where, what was expected and how to mend it."""
