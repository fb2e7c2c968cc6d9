"""Makes a daemon one of another version: Python imports this first, `OTHER_VERSION` says which.

The code stays the present one. What differs is what nodes tell each other of their version, the
formats that they write, and how long certificates last.
"""

import datetime
import json
import os
from typing import Any

import ollamad
from ollamad import machine
from ollamad.core import commands
from ollamad.peers import identity
from ollamad.wire import mux

given: dict[str, Any] = json.loads(os.environ["OTHER_VERSION"])

ollamad.__version__ = given.get("version", ollamad.__version__)
mux.PROTOCOL = given.get("protocol", mux.PROTOCOL)
mux.OLDEST_PROTOCOL = given.get("oldest", mux.OLDEST_PROTOCOL)
machine.STATE_FORMAT = given.get("state", machine.STATE_FORMAT)
if "level" in given:
    # A command that there is stands for one that is new.
    commands._LEVELS[commands.AddUser] = given["level"]
    commands.LEVEL = machine.LEVEL = given["level"]
if "lifetime_s" in given:
    identity.CERTIFICATE_LIFETIME = datetime.timedelta(seconds=given["lifetime_s"])
    identity.RENEW_BEFORE = datetime.timedelta(seconds=given["renew_before_s"])
    identity.RENEWAL_CHECK_S = 0.5
