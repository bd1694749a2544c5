"""The base of all errors that a user can mend: the command prints them without a traceback."""


class UserError(Exception):
    """Says what was found, what was needed and what to do next."""
