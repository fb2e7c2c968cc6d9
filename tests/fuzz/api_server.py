"""The API over fakes on a real port, for the fuzzer: quick, and every model answers.

    python -m tests.fuzz.api_server

Prints its URL and an admin's token, and ends when its input does.
"""

import logging
import sys
import time

import msgspec
import trio

from ollamad.api.app import build_app
from ollamad.api.auth import AuthSettings, mint_local_token
from ollamad.api.calls import ApiSettings
from ollamad.api.limits import RateLimits
from ollamad.api.serve import open_listeners, serve_api
from tests.fakes.api_services import NODE_1, make_world


async def main() -> None:
    # What is a bug is logged with its traceback, and the fuzzer sees a 500.
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR)
    world = make_world()
    world.clock.now = time.time()
    [transfer] = world.library.transfer_list
    done = msgspec.structs.replace(transfer, status="completed", finished_at=time.time())
    world.library.transfer_steps = [done]  # a pull that is watched ends
    settings = ApiSettings(auth=AuthSettings(loopback_role="none"), rate_limits=RateLimits(0, 0, 0))
    app = build_app(world.services, settings)
    token = mint_local_token(world.cluster.state, settings.auth, NODE_1, now=world.clock.now)
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        [url, *_] = await nursery.start(
            serve_api, app, await open_listeners(["127.0.0.1:0"]), shutdown
        )
        print(url, token, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        shutdown.set()


if __name__ == "__main__":
    trio.run(main)
