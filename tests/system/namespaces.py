"""A small Ethernet for daemons: each host is a network namespace, and links can be cut one way.

All hosts hang on one bridge, in a namespace of its own. This process takes part as one more host
that no cut concerns, so a test can ask a node that its peers cannot reach. Needs root. Nothing
here knows what runs on the hosts.

A link is cut by telling one kernel a wrong hardware address for the other: the frames go out and
nobody takes them, without an error for the sender, as on a broken path. It needs neither packet
filters nor kernel modules, and each direction is cut by itself.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

# RFC 2544 sets this range aside for tests of network devices; each network takes a /24.
SUBNETS = [f"198.{18 + high}.{low}" for high in range(2) for low in range(256)]
OWN_HOST = 254
PREFIX = "ollamad-test"  # of the namespaces: PREFIX-PID-NETWORK-HOST
NOWHERE = "02:00:00:00:00:00"  # a hardware address that no host has
IP_TIMEOUT_S = 20.0

_networks = itertools.count(1)  # of this process


class NotPermitted(Exception):
    """This process may not make namespaces, or the tool for it is missing; says which."""


@dataclass(frozen=True)
class NamespaceHost:
    """One host of a `Network`; `command` is put before what shall run there."""

    name: str
    number: int  # in the subnet
    address: str
    namespace: str
    port: str  # its end at the bridge

    @property
    def command(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)

    @property
    def hardware_address(self) -> str:
        return _hardware_address(self.number)


class Network:
    """Hosts on one bridge; a context manager that removes them and whatever runs there.

    Raises (on entering):
      NotPermitted: skip the test with this reason.
    """

    def __init__(self) -> None:
        self._name = f"{PREFIX}-{os.getpid()}-{next(_networks)}"
        self._bridge = f"{self._name}-bridge"
        self._subnet = ""
        self._own_device = ""
        self.hosts: list[NamespaceHost] = []

    def __enter__(self) -> "Network":
        if shutil.which("ip") is None:
            raise NotPermitted("`ip` is not there; install iproute2")
        remove_leftovers()
        try:
            _ip("netns", "add", self._bridge)
        except subprocess.CalledProcessError as error:
            raise NotPermitted(f"network namespaces need root: {error.stderr.strip()}") from None
        try:
            self._in_bridge("link add br0 type bridge", "link set br0 up")
            self._attach_this_process()
        except BaseException as error:
            self._remove()
            if isinstance(error, subprocess.CalledProcessError):
                raise NotPermitted(f"no bridge can be made: {error.stderr.strip()}") from None
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def add(self, name: str) -> NamespaceHost:
        """A new host, linked with all others."""
        number = len(self.hosts) + 1
        host = NamespaceHost(
            name,
            number,
            f"{self._subnet}.{number}",
            f"{self._name}-{name}",
            f"port{number}",
        )
        _ip("netns", "add", host.namespace)
        self.hosts.append(host)
        self._in_bridge(
            f"link add {host.port} type veth peer name eth0 netns {host.namespace}",
            f"link set {host.port} master br0 up",
        )
        _batch(
            host.namespace,
            "link set lo up",
            f"link set eth0 address {host.hardware_address} up",
            f"address add {host.address}/24 dev eth0",
            f"neigh replace {self._subnet}.{OWN_HOST} lladdr {_hardware_address(OWN_HOST)} "
            "dev eth0 nud permanent",
        )
        _batch(None, self._neighbor(host, self._own_device))
        for other in self.hosts[:-1]:
            self.heal_one_way(host, other)
            self.heal_one_way(other, host)
        return host

    # Cutting and healing.

    def cut_one_way(self, source: NamespaceHost, target: NamespaceHost) -> None:
        """What `source` sends does not arrive at `target` any more; the other way is untouched."""
        _batch(
            source.namespace,
            f"neigh replace {target.address} lladdr {NOWHERE} dev eth0 nud permanent",
        )

    def heal_one_way(self, source: NamespaceHost, target: NamespaceHost) -> None:
        _batch(source.namespace, self._neighbor(target, "eth0"))

    def cut(self, one: NamespaceHost, other: NamespaceHost) -> None:
        """Cut a link both ways."""
        self.cut_one_way(one, other)
        self.cut_one_way(other, one)

    def split(self, side: Iterable[NamespaceHost]) -> None:
        """Cut every link between those hosts and all the others."""
        inside = set(side)
        for one, other in itertools.product(inside, set(self.hosts) - inside):
            self.cut(one, other)

    def heal(self) -> None:
        """All links are whole again."""
        for one, other in itertools.permutations(self.hosts, 2):
            self.heal_one_way(one, other)
        self._in_bridge(*(f"link set {host.port} up" for host in self.hosts))

    def unplug(self, host: NamespaceHost) -> None:
        """Pull the cable: the host sees its carrier go; this process cannot reach it either."""
        self._in_bridge(f"link set {host.port} down")

    def plug(self, host: NamespaceHost) -> None:
        self._in_bridge(f"link set {host.port} up")

    def limit(self, host: NamespaceHost, mbit: int) -> None:
        """Give a host a slow cable, in both directions. Needs `tc`.

        Raises:
          NotPermitted: `tc` is not there, or the kernel has no token bucket.
        """
        shape = f"root tbf rate {mbit}mbit burst 64kb latency 50ms".split()
        for namespace, device in ((host.namespace, "eth0"), (self._bridge, host.port)):
            try:
                subprocess.run(
                    ["tc", "-n", namespace, "qdisc", "add", "dev", device, *shape],
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=IP_TIMEOUT_S,
                )
            except FileNotFoundError:
                raise NotPermitted("`tc` is not there; install iproute2") from None
            except subprocess.CalledProcessError as error:
                raise NotPermitted(f"no link can be slowed: {error.stderr.strip()}") from None

    # Inside.

    def _attach_this_process(self) -> None:
        """Take a subnet that no other run on this machine has; its device's name is the lock."""
        for subnet in SUBNETS:
            self._own_device = f"ot{subnet.replace('.', '-')}"
            try:
                _ip(
                    *("link", "add", self._own_device, "type", "veth"),
                    *("peer", "name", "port0", "netns", self._bridge),
                )
            except subprocess.CalledProcessError as error:
                if "File exists" not in error.stderr:
                    raise
                continue
            self._subnet = subnet
            break
        else:
            raise NotPermitted("every subnet for tests is taken")
        self._in_bridge("link set port0 master br0 up")
        _batch(
            None,
            f"link set {self._own_device} address {_hardware_address(OWN_HOST)} up",
            f"address add {subnet}.{OWN_HOST}/24 dev {self._own_device}",
        )

    def _neighbor(self, host: NamespaceHost, device: str) -> str:
        return (
            f"neigh replace {host.address} lladdr {host.hardware_address} dev {device} "
            "nud permanent"
        )

    def _in_bridge(self, *commands: str) -> None:
        _batch(self._bridge, *commands)

    def _remove(self) -> None:
        for name in (*(host.namespace for host in self.hosts), self._bridge):
            _remove_namespace(name)
        self.hosts.clear()


def remove_leftovers() -> None:
    """Remove the namespaces of test runs that were killed."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        made_by = re.fullmatch(rf"{PREFIX}-(\d+)-.*", name)
        if made_by and not os.path.exists(f"/proc/{made_by[1]}"):  # noqa: PTH110
            _remove_namespace(name)


def _remove_namespace(name: str) -> None:
    """End what runs in a namespace, and remove it with its devices."""
    with contextlib.suppress(subprocess.CalledProcessError):
        for pid in _ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        # A namespace outlives its name for a moment; its devices must not.
        with contextlib.suppress(subprocess.CalledProcessError):
            for device in _ip("-n", name, "-o", "link", "show", "type", "veth").splitlines():
                _ip("-n", name, "link", "del", device.split(": ")[1].split("@")[0])
        _ip("netns", "del", name)


def _hardware_address(number: int) -> str:
    return f"02:00:00:00:01:{number:02x}"


def _batch(namespace: str | None, *commands: str) -> None:
    where = () if namespace is None else ("-n", namespace)
    _ip(*where, "-batch", "-", input="\n".join(commands))


def _ip(*arguments: str, input: str = "") -> str:
    return subprocess.run(
        ["ip", *arguments],
        input=input,
        capture_output=True,
        text=True,
        check=True,
        timeout=IP_TIMEOUT_S,
    ).stdout
