"""The `users` group: who may sign in, and as what."""

import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from ollama_dist.completion import role_names, user_names
from ollama_dist.errors import UsageProblem
from ollama_dist.session import Session, command
from ollama_dist.show import Column
from ollama_dist.text import ago

app = typer.Typer(no_args_is_help=True, help="Who may sign in.")

UserArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A username.", autocompletion=user_names)
]
RoleOption = Annotated[
    str,
    typer.Option(
        "--role",
        metavar="ROLE",
        help="viewer, inference, operator or admin.",
        autocompletion=role_names,
    ),
]
PasswordOption = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from stdin.")
]
_COLUMNS = (Column("NAME", gives_way=True), Column("ROLE"), Column("CREATED"))


@app.command("list")
@command
def list_users(session: Session) -> None:
    """All users."""
    from ollama_dist.client import path
    from ollama_dist.show import show_table

    answer = session.api.get(path("users"))
    if session.wants_data:
        session.data(answer)
        return
    now = datetime.now(UTC)
    rows = [
        (user.get("username", "-"), user.get("role", "-"), ago(user.get("created_at"), now))
        for user in answer["users"]
    ]
    show_table(session.out, _COLUMNS, rows, "No users.")


@app.command("add")
@command
def add(
    session: Session,
    username: Annotated[str, typer.Argument(metavar="NAME", help="The new username.")],
    role: RoleOption = "inference",
    password_stdin: PasswordOption = False,
) -> None:
    """Make a user."""
    from ollama_dist.client import path

    password = read_password(password_stdin)
    answer = session.api.post(
        path("users"), {"username": username, "password": password, "role": role}
    )
    if session.wants_data:
        session.data(answer)
    else:
        session.say(f"User {username} may sign in (role {role}).")


@app.command("rm")
@command
def remove(
    session: Session,
    username: UserArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a user; their tokens are dead at once."""
    from ollama_dist.client import path

    if not yes:
        if not sys.stdin.isatty():
            raise UsageProblem("this cannot be undone", hint="Say --yes to do it unasked.")
        typer.confirm(f"Delete the user {username}?", abort=True, err=True)
    session.done(session.api.delete(path("users", username)))


@app.command("role")
@command
def role(
    session: Session,
    username: UserArgument,
    role: Annotated[
        str,
        typer.Argument(
            metavar="ROLE",
            help="viewer, inference, operator or admin.",
            autocompletion=role_names,
        ),
    ],
) -> None:
    """Change what a user may do, from their next request on."""
    from ollama_dist.client import path

    session.done(session.api.post(path("users", username, "role"), {"role": role}))


@app.command("passwd")
@command
def passwd(
    session: Session, username: UserArgument, password_stdin: PasswordOption = False
) -> None:
    """Set a password: anybody's as admin, else your own. It ends all sessions of the user.

    With --password-stdin the new password is the first line, the current one (if you are no
    admin) the second.
    """
    from ollama_dist.client import path
    from ollama_dist.errors import ApiError

    password = read_password(password_stdin)
    url = path("users", username, "password")
    try:
        answer = session.api.post(url, {"password": password})
    except ApiError as problem:
        if problem.field != "current_password":
            raise
        current = read_password(password_stdin, prompt="Current password", again=False)
        answer = session.api.post(url, {"password": password, "current_password": current})
    session.done(answer)


def read_password(from_stdin: bool, *, prompt: str = "New password", again: bool = True) -> str:
    """A password that was typed, or a line of stdin.

    Raises:
      UsageProblem: there is neither.
    """
    if from_stdin:
        line = sys.stdin.readline()
        if not line:
            raise UsageProblem(f"stdin has no line for: {prompt.lower()}")
        return line.rstrip("\r\n")
    if not sys.stdin.isatty():
        raise UsageProblem("no terminal to ask for the password", hint="Use --password-stdin.")
    return str(typer.prompt(prompt, hide_input=True, confirmation_prompt=again, err=True))
