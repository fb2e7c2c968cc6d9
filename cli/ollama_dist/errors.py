"""What can go wrong, with the exit code that it ends in."""

from collections.abc import Mapping
from typing import Any

OK = 0
FAILURE = 1
USAGE = 2
NO_CONNECTION = 3
NOT_ALLOWED = 4
NOT_FOUND = 5
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class CliError(Exception):
    """A problem to tell in one line: what is wrong, and what to do about it."""

    def __init__(self, message: str, *, hint: str = "", exit_code: int = FAILURE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        if not self.hint:
            return self.message
        return f"{self.message.rstrip('.')}. {self.hint}"


class UsageProblem(CliError):
    """The command line asks for something that cannot be."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, exit_code=USAGE)


class NoConnection(CliError):
    """Nothing answers at the address, or it went away in mid-answer."""

    def __init__(self, message: str, *, hint: str = "", exit_code: int = NO_CONNECTION) -> None:
        super().__init__(message, hint=hint, exit_code=exit_code)


class ApiError(CliError):
    """The daemon said no. `status` is HTTP's, `code` the API's own, `field` what it is about."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str = "",
        hint: str = "",
        retry_after_s: int = 0,
        field: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        if status in (401, 403):
            exit_code = NOT_ALLOWED
        elif status == 404:
            exit_code = NOT_FOUND
        else:
            exit_code = FAILURE
        super().__init__(message, hint=hint, exit_code=exit_code)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s
        self.field = field
        self.details = details or {}
