"""The error that a command shows to its user in one line, without a traceback."""


class UserError(Exception):
    """Says what was found, what was needed and what to do next."""
