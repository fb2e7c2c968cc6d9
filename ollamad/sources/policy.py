"""What an origin may make this node do: which schemes, addresses and redirects are allowed.

Names, manifests and redirects come from outside, so without rules anybody who may pull could
have this node ask whatever only this node reaches: another daemon on its loopback, a router, a
cloud's metadata service (server-side request forgery). So plain http, addresses that are not
public, and redirects that nothing vouches for need a setting. Addresses are checked where the
connection is made, on the address that is connected to: a name that is resolved once for the
check and once more for the connection could change in between.

Pure: resolves nothing and connects to nothing.
"""

import dataclasses
import ipaddress
import urllib.parse
from collections.abc import Iterable
from typing import Final

from ollamad.sources.base import OriginRefused

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

ANY_HOST: Final = "*"
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
# All of IPv6 that is routed on the internet. What lies outside has other meanings, some of which
# lead to IPv4 addresses behind this node (64:ff9b:1::/48, ::ffff:0:0:0/96, ::/96).
_INTERNET: Final = ipaddress.IPv6Network("2000::/3")
_PORTS: Final = {"https": 443, "http": 80}


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """The part of a URL that says who is spoken to."""

    scheme: str
    host: str  # lower case, without brackets
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS.get(self.scheme) else f"{host}:{self.port}"


def origin_of(url: str) -> Origin:
    """Who a URL speaks to.

    Raises:
      OriginRefused: it is no http or https URL.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise OriginRefused("the URL is not valid; check how it is written") from None
    if parts.scheme not in _PORTS or not host:
        raise OriginRefused(
            f"{parts.scheme or 'it'}: is not http or https with a host; use https://HOST/…"
        )
    return Origin(parts.scheme, host, port or _PORTS[parts.scheme])


@dataclasses.dataclass(frozen=True, slots=True)
class HostList:
    """Hosts of a setting: `name`, `name:port`, an address, a network, `*`."""

    names: frozenset[str] = frozenset()
    networks: tuple[IpNetwork, ...] = ()

    def __or__(self, other: "HostList") -> "HostList":
        return HostList(self.names | other.names, self.networks + other.networks)

    def has(self, origin: Origin) -> bool:
        """Whether this host is on the list by its name (or the address that it is written as)."""
        if ANY_HOST in self.names or origin.host in self.names:
            return True
        if f"{origin.host}:{origin.port}" in self.names:
            return True
        try:
            return self.has_address(ipaddress.ip_address(origin.host))
        except ValueError:
            return False

    def has_address(self, address: IpAddress) -> bool:
        return any(address in network for network in self.networks)


def parse_hosts(text: str) -> HostList:
    """Read a setting: hosts and networks with commas between.

    Raises:
      ValueError: an item is neither.
    """
    names: set[str] = set()
    networks: list[IpNetwork] = []
    for item in (part.strip().lower() for part in text.split(",")):
        if not item:
            continue
        try:
            networks.append(ipaddress.ip_network(item, strict=False))
        except ValueError:
            if "/" in item or " " in item:
                raise ValueError(
                    f"{item!r} is no host, host:port, address or network such as 10.0.0.0/8"
                ) from None
            names.add(item)
    return HostList(frozenset(names), tuple(networks))


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """The rules; what is allowed beyond the public internet over https."""

    allow_http: HostList = HostList()
    allow_private: HostList = HostList()
    any_redirects: bool = False

    def check_url(self, url: str) -> Origin:
        """Whether a URL may be asked at all.

        Raises:
          OriginRefused: its scheme is not allowed, or it names an address that is not.
        """
        origin = origin_of(url)
        if origin.scheme == "http" and not self.allow_http.has(origin):
            raise OriginRefused(
                f"http://{origin} is not encrypted, so anybody on the way can read and change "
                f"what comes. Use https, or allow it: sources.allow_http: {origin}"
            )
        try:
            address = ipaddress.ip_address(origin.host)
        except ValueError:
            return origin
        self.check_address(origin, address)
        return origin

    def check_address(self, origin: Origin, address: IpAddress) -> None:
        """Whether that host may be at this address.

        Raises:
          OriginRefused: it is not a public one, and nothing allows it.
        """
        if self.allow_private.has(origin):
            return
        for each in _faces(address):
            if not is_public(each) and not self.allow_private.has_address(each):
                where = "" if str(address) == origin.host else f" is at {address}, which"
                raise OriginRefused(
                    f"{origin}{where} is not a public address; models are not fetched from the "
                    "networks behind this node unless that is allowed: "
                    f"sources.allow_private: {origin}"
                )

    def check_redirect(self, old: Origin, new_url: str, *, vouched: bool) -> Origin:
        """Whether a redirect may be followed.

        Args:
          vouched: a digest, known before, says whether what comes is right; so it does not
            matter who sends it.

        Raises:
          OriginRefused: it may not.
        """
        new = self.check_url(new_url)
        if (new.host, new.port) != (old.host, old.port) and not (vouched or self.any_redirects):
            raise OriginRefused(
                f"{old} redirects to another host, {new}, and no digest says what should come "
                "from there. Add the file's digest (#sha256=…), ask that host itself, or allow "
                "it: sources.redirects: any"
            )
        return new


def is_public(address: IpAddress) -> bool:
    """Whether an address is one of the internet at large."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address not in _INTERNET and address not in _NAT64:
            return False
    return address.is_global and not address.is_multicast


def _faces(address: IpAddress) -> Iterable[IpAddress]:
    """The address, and the IPv4 addresses that an IPv6 one stands for."""
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            yield address.ipv4_mapped
        if address.sixtofour is not None:
            yield address.sixtofour
        if address.teredo is not None:
            yield from address.teredo
        if address in _NAT64:
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
