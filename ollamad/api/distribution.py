"""Handlers: whether the cluster spreads models by itself."""

import msgspec

from ollamad.api.asgi import Reply
from ollamad.api.bodies import AutoConfigureBody
from ollamad.api.calls import Call, reply
from ollamad.api.schemas import Configured, Distribution
from ollamad.core.commands import ChangeSettings


async def show(call: Call) -> Reply:
    return reply(Distribution(call.services.cluster.state.settings.auto_distribution))


async def configure(call: Call) -> Reply:
    """Of the whole cluster: the setting is replicated."""
    enabled = (await call.body(AutoConfigureBody)).enabled
    settings = call.services.cluster.state.settings
    if settings.auto_distribution != enabled:
        changed = msgspec.structs.replace(settings, auto_distribution=enabled)
        await call.propose(ChangeSettings(changed))
    word = "enabled" if enabled else "disabled"
    return reply(Configured(f"Auto-distribution {word}", "success"))
