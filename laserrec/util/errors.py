"""Errors that are the user's to mend."""


class UserError(Exception):
    """Bad input or settings. The message says what is wrong, where, and what to do; the CLI prints it alone."""
