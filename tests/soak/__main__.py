"""`make soak`: half an hour of it, as a table."""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tests.conftest import smollm2_file
from tests.soak.run import MODEL, Soak
from tests.system.harness import Cluster

NODES = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the daemons must not outlive it
    model = smollm2_file()
    environment = {
        "OLLAMAD_MODELS__REPLICAS": str(NODES),
        "OLLAMA_CONTEXT_LENGTH": "512",
        "OLLAMAD_AUTH__TOKEN_TTL": "1h",  # one token serves for the usual half hour
    }
    with (
        tempfile.TemporaryDirectory(prefix="ollamad-soak-") as name,
        Cluster(Path(name), environment) as cluster,
    ):
        first = cluster.found()
        cluster.grow(NODES - 1)
        first.import_model(model, MODEL)
        first.post(f"/models/{MODEL}/download", {"nodes": [n.id for n in cluster.nodes[1:]]})
        cluster.wait_replicas(MODEL, cluster.nodes)
        found = Soak(cluster, 60 * chosen.minutes, chosen.seed).run()
        tracebacks = [node.name for node in cluster.nodes if "Traceback (most recent" in node.log()]
    print(found.report())
    for problem in (*found.failures[:20], *found.leaks(), *found.left_behind, *tracebacks):
        print(f"problem: {problem}")
    return bool(found.failures or found.leaks() or found.left_behind or tracebacks)


if __name__ == "__main__":
    sys.exit(main())
