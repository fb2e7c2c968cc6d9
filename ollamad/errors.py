"""Errors that end the program with one line."""


class StartError(Exception):
    """The daemon cannot start; the message is one line that says what to do."""


class HasLeft(StartError):
    """What was the node's cluster is not any more, and nobody has said what comes next."""
