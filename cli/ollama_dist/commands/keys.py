"""The `keys` group: tokens for programs, with a role, an expiry and quotas."""

import sys
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from ollama_dist.completion import key_ids, period_names, role_names
from ollama_dist.errors import UsageProblem
from ollama_dist.session import Session, command
from ollama_dist.show import Column
from ollama_dist.text import ago, parse_duration, until

app = typer.Typer(no_args_is_help=True, help="API keys, for programs.")

_COLUMNS = (
    Column("ID"),
    Column("NAME", gives_way=True),
    Column("ROLE"),
    Column("CREATED"),
    Column("EXPIRES"),
    Column("REQUESTS", right=True),
    Column("TOKENS", right=True),
    Column("PER"),
)


@app.command("list")
@command
def list_keys(session: Session) -> None:
    """All keys, what they may and what they have used; never their secrets."""
    from ollama_dist.client import path
    from ollama_dist.show import show_table

    answer = session.api.get(path("keys"))
    if session.wants_data:
        session.data(answer)
        return
    now = datetime.now(UTC)
    show_table(session.out, _COLUMNS, [_row(key, now) for key in answer["keys"]], "No API keys.")


@app.command("create")
@command
def create(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What you will know it by.")],
    role: Annotated[
        str,
        typer.Option(
            "--role",
            metavar="ROLE",
            help="viewer, inference, operator or admin.",
            autocompletion=role_names,
        ),
    ] = "inference",
    ttl: Annotated[
        str | None,
        typer.Option(
            "--ttl", metavar="TIME", help="How long it works: 24h, 90d. For ever without."
        ),
    ] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", metavar="N", min=0, help="Requests it may make.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", metavar="N", min=0, help="Tokens it may use, of prompts and answers."
        ),
    ] = None,
    per: Annotated[
        str,
        typer.Option(
            "--per",
            metavar="PERIOD",
            help="What the quotas are for: minute, hour, day, month or total.",
            autocompletion=period_names,
        ),
    ] = "total",
) -> None:
    """Make a key and print it. It is shown this once."""
    from ollama_dist.client import path

    body: dict[str, Any] = {"name": name, "role": role, "quota_period": per}
    if ttl is not None:
        try:
            body["ttl_seconds"] = parse_duration(ttl)
        except ValueError as problem:
            raise UsageProblem(f"--ttl: {problem}") from None
    if requests is not None:
        body["request_quota"] = requests
    if tokens is not None:
        body["token_quota"] = tokens
    made = session.api.post(path("keys"), body)
    if session.wants_data:
        session.data(made)
        return
    # The key alone on stdout, so that it can be piped to where it is needed.
    session.note(f"Key {made.get('id')} (role {made.get('role')}). It is not shown again:")
    session.say(made["key"])


@app.command("rm")
@command
def remove(
    session: Session,
    key: Annotated[str, typer.Argument(metavar="ID", help="The key's id.", autocompletion=key_ids)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a key; it is dead at once."""
    from ollama_dist.client import path

    if not yes:
        if not sys.stdin.isatty():
            raise UsageProblem("this cannot be undone", hint="Say --yes to do it unasked.")
        typer.confirm(f"Delete the API key {key}?", abort=True, err=True)
    session.done(session.api.delete(path("keys", key)))


def _row(key: dict[str, Any], now: datetime) -> tuple[object, ...]:
    used = key.get("used") or {}
    return (
        key.get("id", "-"),
        key.get("name") or "-",
        key.get("role", "-"),
        ago(key.get("created_at"), now),
        "expired" if key.get("expired") else _expiry(key.get("expires_at"), now),
        _share(used.get("requests"), key.get("request_quota")),
        _share(used.get("tokens"), key.get("token_quota")),
        key.get("quota_period", "-"),
    )


def _expiry(stamp: object, now: datetime) -> str:
    return until(stamp, now) if stamp else "never"


def _share(used: object, quota: object) -> str:
    return f"{used or 0}" if quota is None else f"{used or 0}/{quota}"
