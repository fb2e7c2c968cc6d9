"""One libtorrent peer of `bench_swarm`, set up as well as it can be for a LAN.

    python -m tests.bench.swarm_torrent TORRENT DIRECTORY OWN_ADDRESS PEER_ADDRESS...

TCP only, no trackers and no discovery: it is told of all peers. Says `ready`, begins at a line on
its input, says `done` with seconds when the file is complete, and goes on seeding until the next
line.
"""

import resource
import sys
import threading
import time
from pathlib import Path

import libtorrent as lt

PORT = 6881


def processor_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    torrent, directory, own, *peers = sys.argv[1:]
    session = lt.session(
        {
            "listen_interfaces": f"{own}:{PORT}",
            "outgoing_interfaces": own,
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "enable_outgoing_utp": False,
            "enable_incoming_utp": False,
            "allow_multiple_connections_per_ip": True,
            "unchoke_slots_limit": -1,
            "connections_limit": 200,
            "alert_mask": 0,
        }
    )
    parameters = lt.add_torrent_params()
    parameters.ti = lt.torrent_info(torrent)
    parameters.save_path = directory
    parameters.flags &= ~lt.torrent_flags.auto_managed
    parameters.flags |= lt.torrent_flags.paused
    if (Path(directory) / parameters.ti.name()).exists():
        parameters.flags |= lt.torrent_flags.seed_mode  # a paused torrent is never checked
    handle = session.add_torrent(parameters)
    before = processor_s()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    handle.resume()
    for peer in peers:
        handle.connect_peer((peer, PORT))
    while not handle.status().is_seeding:
        time.sleep(0.02)
    print(f"done {time.perf_counter() - began:.4f}", flush=True)
    stopped = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stopped.set())).start()
    stopped.wait()
    sent = handle.status().total_payload_upload
    print(f"bye {processor_s() - before:.4f} {sent}", flush=True)


if __name__ == "__main__":
    main()
