"""Which addresses a webhook may go to: those of the internet, unless the settings allow others.

Knows no Redis.
"""

import asyncio
import ipaddress
import re
import socket

import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

NAT64 = ipaddress.ip_network("64:ff9b::/96")
HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")  # a name or an IPv4 address, or an IPv6 address without a zone


class Forbidden(ValueError):
    """The address is none that may be called."""


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet's, and not of this machine, a private network or anything special.

    An IPv6 address that stands for an IPv4 one is what that one is.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner is None and address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local or address.is_reserved:  # reserved are also forms that once stood for IPv4 addresses
            return False
    return address.is_global and not address.is_multicast


def check_url(url: str, allow_private: bool) -> None:
    """Forbidden for what can be seen to be no address of a webhook before its name is resolved."""
    try:
        url.encode("ascii")
        parts = httpx.URL(url)  # which also sends: no other reading of the same text counts
        parts.host.encode("idna")
    except (httpx.InvalidURL, ValueError) as error:
        raise Forbidden(f"not an address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise Forbidden("wanted an http:// or https:// address")
    if parts.userinfo or parts.fragment:
        raise Forbidden("wanted an address without user, password and fragment")
    if not HOST.fullmatch(parts.host) or not 0 < (parts.port or 1) < 1 << 16:
        raise Forbidden(f"not a host and port: {parts.netloc.decode()}")
    address = _address_of(parts.host)
    if address is not None and not allow_private and not is_public(address):
        raise Forbidden(f"{address} is not a public address")


def _address_of(host: str) -> Address | None:
    """The address that a host is, in any spelling that resolvers take (127.1, 0x7f000001); None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host.rstrip(".")))
        except OSError:
            return None  # it is resolved when it is called


async def resolve(host: str, port: int, allow_private: bool) -> list[str]:
    """The addresses of a host. Forbidden if any of them is not public: none of its names is then to be trusted."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if not allow_private and not is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise Forbidden(f"{host} is {address}, which is not a public address")
    return addresses
