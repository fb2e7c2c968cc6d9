"""The `distribution` group: whether the cluster spreads models by itself."""

import typer

from ollama_dist.session import Session, command

app = typer.Typer(no_args_is_help=True, help="Whether the cluster spreads models by itself.")


@app.command("on")
@command
def on(session: Session) -> None:
    """Have the cluster keep as many copies of each model as it should have."""
    _configure(session, True)


@app.command("off")
@command
def off(session: Session) -> None:
    """Leave models where they are; copies are made where somebody asks for them."""
    _configure(session, False)


@app.command("status")
@command
def status(session: Session) -> None:
    """Whether it is on."""
    answer = session.api.get("/distribution")
    if session.wants_data:
        session.data(answer)
    else:
        session.say(f"Auto-distribution is {'on' if answer.get('enabled') else 'off'}.")


def _configure(session: Session, enabled: bool) -> None:
    answer = session.api.post("/distribution/auto-configure", {"enabled": enabled})
    if session.wants_data:
        session.data(answer)
    else:
        session.say(answer.get("message") or "done")
