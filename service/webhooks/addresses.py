"""Which addresses a webhook may go to: those of the internet, unless the settings allow others.

Knows no Redis.
"""

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

NAT64 = ipaddress.ip_network("64:ff9b::/96")


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
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast


def check_url(url: str, allow_private: bool) -> None:
    """Forbidden for what can be seen to be no address of a webhook before its name is resolved."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        url.encode("ascii")
    except ValueError as error:
        raise Forbidden(f"not an address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Forbidden("wanted an http:// or https:// address")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise Forbidden("wanted an address without user, password and fragment")
    try:
        address = ipaddress.ip_address(parts.hostname.partition("%")[0])
    except ValueError:
        return  # a name: it is resolved when it is called
    if not allow_private and not is_public(address):
        raise Forbidden(f"{address} is not a public address")


async def resolve(host: str, port: int, allow_private: bool) -> list[str]:
    """The addresses of a host. Forbidden if any of them is not public: none of its names is then to be trusted."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if not allow_private and not is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise Forbidden(f"{host} is {address}, which is not a public address")
    return addresses
