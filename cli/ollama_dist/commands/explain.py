"""`explain`: where a prompt would go, and why."""

from typing import Any

from ollama_dist.commands.inference import (
    ModelArgument,
    PromptArgument,
    SystemOption,
    read_prompt,
)
from ollama_dist.session import Session, command
from ollama_dist.show import Column, show_table

COLUMNS = (
    Column(""),
    Column("NODE"),
    Column("FIRST TOKEN", right=True),
    Column("CACHED", right=True),
    Column("IN USE", right=True),
    Column("TO READ", right=True),
    Column("TOKENS/S", right=True),
    Column("STATE"),
)


@command
def explain(
    session: Session,
    model: ModelArgument,
    prompt: PromptArgument = None,
    system: SystemOption = None,
) -> None:
    """Which node would answer a prompt, and how all of them compare; nothing is run."""
    from ollama_dist.client import path

    messages = [{"role": "user", "content": read_prompt(prompt)}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    answer = session.api.post(path("explain"), {"model": model, "messages": messages})
    if session.wants_data:
        session.data(answer)
        return
    rows = [_row(score) for score in answer["scores"]]
    show_table(session.out, COLUMNS, rows, "No node holds this model.")
    session.say(f"{answer['policy']}: {answer['why']}")


def _row(score: dict[str, Any]) -> tuple[str, ...]:
    state = score["why_not"] or ("loaded" if score["loaded"] else "not loaded")
    if not score["loaded"] and score["willing"] and not score["fits"]:
        state = "no room"
    return (
        "*" if score["chosen"] else "",
        str(score["node"]),
        f"{score['time_to_first_token_s']:.2f} s" if score["willing"] else "-",
        f"{100 * score['cached']:.0f} %",
        f"{score['in_use']}/{score['slots']}",
        str(score["uncached_tokens"] + score["pending_tokens"]),
        f"{score['prefill_rate']:.0f}",
        state,
    )
