"""The one exception that the command line shows as a message instead of a traceback."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Something the user can mend: the message says what was wrong, where, what was expected and what to do."""
