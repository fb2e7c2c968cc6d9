"""What an origin may make a node ask: tables of addresses, and names that change their mind."""

import ipaddress
from collections.abc import Sequence
from typing import Any

import httpcore
import pytest

from ollamad.sources.base import OriginRefused
from ollamad.sources.client import GuardedBackend, proxy_for
from ollamad.sources.policy import Origin, Policy, is_public, origin_of, parse_hosts

HOST = Origin("https", "models.example", 443)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",
        "100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1",
        "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "2002:a00:1::",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "::127.0.0.1",
        "::ffff:0:127.0.0.1", "fec0::1", "2001:0:7f00:1::",
    ],
)  # fmt: skip
def test_private_addresses_are_refused(address: str) -> None:
    with pytest.raises(OriginRefused, match=r"sources\.allow_private: models\.example"):
        Policy().check_address(HOST, ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_not(address: str) -> None:
    Policy().check_address(HOST, ipaddress.ip_address(address))


def test_what_is_allowed_is_allowed_and_no_more() -> None:
    policy = Policy(allow_private=parse_hosts("10.0.0.0/8, models.example, other:8443"))
    ten, loopback = ipaddress.ip_address("10.1.1.1"), ipaddress.ip_address("127.0.0.1")
    assert not is_public(ten)
    policy.check_address(Origin("https", "anybody", 443), ten)
    policy.check_address(HOST, loopback)
    policy.check_address(Origin("https", "other", 8443), loopback)
    for port, host in ((443, "other"), (443, "anybody")):
        with pytest.raises(OriginRefused):
            policy.check_address(Origin("https", host, port), loopback)


@pytest.mark.parametrize("url", ["ftp://x/y", "file:///etc/passwd", "https://", "x", "https://h:z"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(OriginRefused):
        origin_of(url)


@pytest.mark.parametrize("text", ["a b", "x/y", "10.0.0.0/99"])
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no host"):
        parse_hosts(text)


def test_redirects() -> None:
    policy = Policy(allow_http=parse_hosts("plain.example"))
    policy.check_redirect(HOST, "https://models.example/other", vouched=False)
    policy.check_redirect(HOST, "https://cdn.example/x", vouched=True)
    for url, vouched in (
        ("https://cdn.example/x", False),
        ("http://models.example/x", True),
        ("https://127.0.0.1/x", True),
        ("https://[::1]/x", True),
        ("https://2130706433/x", False),
    ):
        with pytest.raises(OriginRefused):
            policy.check_redirect(HOST, url, vouched=vouched)


class Recorder(httpcore.AsyncNetworkBackend):
    """Notes where it is sent to."""

    def __init__(self) -> None:
        self.connected: list[str] = []

    async def connect_tcp(self, host: str, *args: Any, **more: Any) -> httpcore.AsyncNetworkStream:
        self.connected.append(host)
        raise httpcore.ConnectError("no")


def resolving(*rounds: Sequence[str]) -> Any:
    """A resolver that gives other addresses each time."""
    left = list(rounds)

    async def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(None, None, 0, "", (address, port)) for address in left.pop(0)]

    return resolve


async def test_the_address_that_is_connected_to_is_the_one_that_was_checked() -> None:
    """A name that is public when looked at and private when used: it is resolved once only."""
    inner = Recorder()
    resolve = resolving(["8.8.8.8"], ["127.0.0.1"])
    backend = GuardedBackend(Policy(), inner=inner, resolve=resolve)
    with pytest.raises(httpcore.ConnectError):
        await backend.connect_tcp("rebind.example", 443)
    assert inner.connected == ["8.8.8.8"]
    with pytest.raises(OriginRefused, match=r"rebind\.example is at 127\.0\.0\.1"):
        await backend.connect_tcp("rebind.example", 443)
    assert inner.connected == ["8.8.8.8"]


async def test_of_several_addresses_only_the_allowed_ones_are_tried() -> None:
    inner = Recorder()
    resolve = resolving(["10.0.0.1", "8.8.8.8", "fe80::1%eth0", "1.1.1.1"])
    with pytest.raises(OriginRefused):
        await GuardedBackend(Policy(), inner=inner, resolve=resolve).connect_tcp("mixed", 443)
    assert inner.connected == ["8.8.8.8", "1.1.1.1"]


def test_proxies() -> None:
    environment = {
        "HTTPS_PROXY": "http://proxy:3128", "http_proxy": "plain:8080",
        "no_proxy": "lan.example,.inside.example,10.0.0.1",
    }  # fmt: skip
    assert proxy_for("https://models.example/x", environment) == "http://proxy:3128"
    assert proxy_for("http://models.example/x", environment) == "http://plain:8080"
    for host in ("lan.example", "a.inside.example", "10.0.0.1"):
        assert proxy_for(f"https://{host}/x", environment) == ""
    assert proxy_for("https://x/", {"NO_PROXY": "*", "ALL_PROXY": "http://p"}) == ""
    assert proxy_for("https://x/", {}) == ""
