"""Errors that the user can fix."""


class UserError(Exception):
    """Wrong input or settings. The message says what is wrong, where, and what to do; the CLI prints only that."""
