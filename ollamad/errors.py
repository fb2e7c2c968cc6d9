"""Errors that end the program with one line."""


class StartError(Exception):
    """The daemon cannot start; the message is one line that says what to do."""
