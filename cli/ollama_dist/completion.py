"""Model and node names for the shell. Silent: a daemon that does not answer completes nothing."""

import contextlib
from collections.abc import Iterator

import typer

from ollama_dist.session import Session

TIMEOUT_S = 0.7  # a key press must not hang for longer


def model_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The cluster's models whose name starts with `incomplete`."""
    return list(_names(ctx, "models", ("name",), incomplete))


def node_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The cluster's nodes by name, or by id where that is what was begun."""
    return list(_names(ctx, "nodes", ("name", "id"), incomplete))


def user_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The usernames that start with `incomplete`, for who may see them."""
    return list(_names(ctx, "users", ("username",), incomplete))


def key_ids(ctx: typer.Context, incomplete: str) -> list[str]:
    """The ids of the API keys, for who may see them."""
    return list(_names(ctx, "keys", ("id",), incomplete))


def role_names(incomplete: str) -> list[str]:
    """The roles that start with `incomplete`."""
    roles = ("viewer", "inference", "operator", "admin")
    return [role for role in roles if role.startswith(incomplete)]


def period_names(incomplete: str) -> list[str]:
    """The periods of quotas that start with `incomplete`."""
    periods = ("minute", "hour", "day", "month", "total")
    return [period for period in periods if period.startswith(incomplete)]


def _names(
    ctx: typer.Context, collection: str, keys: tuple[str, ...], incomplete: str
) -> Iterator[str]:
    # The commands' own callbacks do not run while the shell completes: read what was typed.
    given = {**ctx.find_root().params, **{k: v for k, v in ctx.params.items() if v is not None}}
    session = Session(host=given.get("host"), token=given.get("token"))
    with contextlib.suppress(Exception):
        from ollama_dist.client import Api, path

        with Api(session.address, token=session.token, timeout_s=TIMEOUT_S) as api:
            items = api.get(path(collection))[collection]
        for item in items:
            names = [str(item[key]) for key in keys if item.get(key)]
            yield from (name for name in names[:1] if name.startswith(incomplete))
            if incomplete:
                yield from (name for name in names[1:] if name.startswith(incomplete))
