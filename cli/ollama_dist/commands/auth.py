"""The `auth` group: signing in, and out."""

import sys
from typing import Annotated

import typer

from ollama_dist import credentials
from ollama_dist.errors import ApiError, CliError, NoConnection, UsageProblem
from ollama_dist.session import Session, command

app = typer.Typer(no_args_is_help=True, help="Signing in and out.")


@app.command("login")
@command
def login(
    session: Session,
    username: Annotated[
        str | None, typer.Option("--username", "-u", metavar="NAME", help="Asked for without it.")
    ] = None,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the password from stdin.")
    ] = False,
) -> None:
    """Sign in at a node; the sign-in is kept for its address."""
    from ollama_dist.client import Api, login_of

    if password_stdin:
        if not username:
            raise UsageProblem("--password-stdin needs --username")
        password = sys.stdin.readline().rstrip("\r\n")
    elif sys.stdin.isatty():
        username = username or str(typer.prompt("Username", default="admin", err=True))
        password = str(typer.prompt("Password", hide_input=True, err=True))
    else:
        raise UsageProblem("no terminal to ask for the password", hint="Use --password-stdin.")
    address = session.address
    with Api(address, token=session.token) as api:
        answer = api.sign_in(username, password)
    with credentials.lock():
        credentials.save_login(address, login_of(answer, username=username))
    user = answer.get("user") or {}
    if session.wants_data:
        # The tokens stay in the file: output ends up in logs.
        session.data({"user": user, "expires_at": answer.get("expires_at")})
    else:
        name, role = user.get("username", username), user.get("role", "-")
        session.say(f"Signed in at {address.url} as {name} (role {role}).")


@app.command("logout")
@command
def logout(session: Session) -> None:
    """Sign out: the tokens are dead on every node, and forgotten here."""
    from ollama_dist.client import path

    address = session.address
    if not session.token and credentials.load_login(address) is None:
        raise CliError(f"there is no sign-in at {address.url}")
    answer = {"message": "Signed out"}
    try:
        answer = session.api.post(path("auth", "logout"))
    except NoConnection as problem:
        session.note(f"Forgotten here only: {problem.message}")
    except ApiError as problem:
        # Expired: the daemon had nothing left to end.
        if problem.status != 401:
            raise
    if not session.token:
        with credentials.lock():
            credentials.save_login(address, None)
    if session.wants_data:
        session.data(answer)
    else:
        session.say(f"Signed out at {address.url}.")


@app.command("whoami")
@command
def whoami(session: Session) -> None:
    """Who this program is to the daemon, and by which token."""
    from ollama_dist.client import path

    answer = session.api.get(path("auth", "me"))
    if session.wants_data:
        session.data(answer)
        return
    user = answer.get("user") or answer
    name, role = user.get("username") or "nobody", user.get("role", "-")
    session.say(f"{name} (role {role}) at {session.address.url}, by {session.api.credential}")
