"""`python -m ollamad` is `ollamad`; the daemon starts runner processes this way.

A runner's start is part of every model's load, so it is taken before anything else is imported.
"""

import sys

if sys.argv[1:2] == ["runner"]:
    from ollamad.engine.runner import run_runner

    sys.exit(run_runner(sys.argv[2:]))

from ollamad.main import main

main()
