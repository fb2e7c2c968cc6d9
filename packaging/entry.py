"""Where the frozen program begins: one file that is `ollamad`, and `ollama-dist` by that name.

A runner's start is part of every model's load, so it is taken before anything else is imported.
"""

import sys
from pathlib import PurePath

if PurePath(sys.argv[0]).name.startswith("ollama-dist"):
    from ollama_dist.main import main
elif sys.argv[1:2] == ["runner"]:
    from ollamad.engine.runner import run_runner

    sys.exit(run_runner(sys.argv[2:]))
else:
    from ollamad.main import main

main()
