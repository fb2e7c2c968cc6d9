"""kill -9 of leaders in a loop while clients write: nothing acknowledged is lost."""

import random
import time
from collections.abc import Callable

from tests.system.harness import Cluster, fault_seconds
from tests.system.write_load import WriteLoad


def test_leaders_that_are_killed_in_a_loop_lose_nothing(
    voters: Cluster, record_property: Callable[[str, object], None]
) -> None:
    """Every third time, as many followers as the cluster survives go with the leader."""
    spare = (len(voters.nodes) - 1) // 2
    kills = rounds = 0
    with WriteLoad(voters) as load:
        deadline = time.monotonic() + fault_seconds()
        while time.monotonic() < deadline:
            rounds += 1
            victims = [voters.leader()]
            if rounds % 3 == 0:
                victims += random.sample(voters.followers(), spare - 1)
            load.note(f"kill of {', '.join(victim.name for victim in victims)}")
            for victim in victims:
                victim.kill()
            kills += len(victims)
            # Back at once, or when the others have gone on for a while.
            if rounds % 2 == 0:
                load.wait_progress()
            for victim in victims:
                victim.start(wait=False)
            for victim in victims:
                victim.wait_ready()
            load.wait_progress()
    account = load.check()
    print(f"{kills} kills")
    record_property("kills", kills)
    record_property("acknowledged", account.acknowledged)
    record_property("unknown", account.unknown)
    record_property("longest_gap_s", round(account.longest_gap_s, 2))
