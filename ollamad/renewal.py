"""`ollamad renew`: a new certificate for a node that was off for longer than the old one is valid.

Every member has the CA's key in its journal, and who was removed is turned away by its id, so an
old certificate says nothing against a node. It is not renewed at a start because a clock that is
wrong looks the same: a person has to say that it is right.
"""

import datetime
import os
import time
from pathlib import Path

import trio

from ollamad.backup import read_journal
from ollamad.datadir import DataDir, DataDirError, check_owner
from ollamad.errors import StartError
from ollamad.peers.identity import Identity, IdentityError
from ollamad.raft.errors import RaftError
from ollamad.wire.codec import MalformedMessage


def renew(data_dir: Path) -> str:
    """Sign a new certificate if the present one is over, or soon will be.

    Returns:
      Until when the certificate is valid, for the user.

    Raises:
      StartError: it cannot be done here; nothing was changed.
    """
    os.umask(0o077)
    check_owner(data_dir)
    if not (data_dir / "raft.db").is_file():
        raise StartError(f"the node of {data_dir} is in no cluster; there is nothing to renew")
    try:
        with DataDir(data_dir) as directory:
            directory.check_whole()
            identity = Identity.load_or_create(directory.identity)
            state = trio.run(read_journal, directory).state
            last_joined = max(member.joined_at for member in state.members.values())
            if time.time() < last_joined:
                raise StartError(
                    "this machine's clock says that members have yet to join the cluster; set it "
                    "(NTP) first"
                )
            assert state.ca is not None, "a founded cluster has a CA"
            now = datetime.datetime.now(datetime.UTC)
            renewed = identity.renew_if_due(state.ca, state.incarnation, now)
            until = f"{identity.valid_until:%Y-%m-%d %H:%M} UTC"
    except (DataDirError, IdentityError, RaftError, MalformedMessage, OSError) as error:
        raise StartError(str(error)) from None
    if renewed:
        return f"the certificate is valid until {until} now; start the node"
    return f"the certificate is valid until {until}; it need not be renewed yet"
