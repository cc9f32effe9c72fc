"""Checks where a webhook may go: public addresses only, unless the settings allow private ones.

Knows no Redis.
"""

import asyncio
import ipaddress
import socket
from concurrent.futures import Executor
from functools import partial

import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# What `is_global` of some Python versions calls public. The rest of IANA's special-purpose registries it knows.
NOT_PUBLIC = [ipaddress.ip_network(one) for one in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "5f00::/16")]
NOT_PUBLIC += [ipaddress.ip_network(one) for one in ("64:ff9b:1::/48", "100::/64", "2001::/23")]
NAT64 = ipaddress.ip_network("64:ff9b::/96")
CLOUD = ipaddress.ip_address("168.63.129.16")  # Azure's own services, for machines inside only


class AddressNotAllowed(ValueError):
    """A webhook must not be sent to this address."""


def is_public(address: Address) -> bool:
    """Whether an address is on the internet, and not this machine, in a private network or reserved.

    An IPv6 address that stands for an IPv4 address counts as that one.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner is None and address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local or address.is_reserved:  # reserved: among others, older forms of IPv4 addresses
            return False
    if address.is_multicast or address == CLOUD or any(address in network for network in NOT_PUBLIC):
        return False
    return address.is_global


def check_url(url: str, allow_private: bool) -> None:
    """Raise AddressNotAllowed for a URL that is invalid, or not allowed whatever its name resolves to."""
    try:
        url.encode("ascii")
        parts = httpx.URL(url)  # httpx also sends, so its reading of the URL is the one that counts
        parts.host.encode("idna")
    except (httpx.InvalidURL, ValueError) as error:
        raise AddressNotAllowed(f"not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise AddressNotAllowed("not an http:// or https:// URL")
    if parts.port is not None and not 1 <= parts.port <= 65535:
        raise AddressNotAllowed(f"there is no port {parts.port}")
    if parts.userinfo or parts.fragment:
        raise AddressNotAllowed("a user, a password or a fragment is not allowed in the URL")
    try:
        address = ipaddress.ip_address(parts.host)
    except ValueError:
        return  # a name, or another spelling of an address: it is resolved before it is called
    if not (allow_private or is_public(address)):
        raise AddressNotAllowed(f"{address} is not a public address")


async def resolve(host: str, port: int, allow_private: bool, lookups: Executor) -> list[str]:
    """Return the addresses of a host, which a thread of `lookups` looks up.

    AddressNotAllowed if any is not public: then the name is not to be trusted.
    """
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(lookups, look_up)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if not allow_private and not is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise AddressNotAllowed(f"{host} resolves to {address}, which is not a public address")
    return addresses
