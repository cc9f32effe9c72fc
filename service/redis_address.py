"""Addresses of Redis: those of redis-py, and of a primary that Sentinels watch.

The latter is `redis+sentinel://[user:password@]host[:26379],host,.../NAME[/DATABASE]`, or `rediss+sentinel://` if Redis
has TLS. NAME is what the Sentinels call the primary. Options after `?` are those of redis:// addresses, and
`sentinel_username` and `sentinel_password`.
"""

import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import SplitResult, unquote, urlsplit

from redis import Redis
from redis.asyncio import ConnectionPool as AsyncPool
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.connection import parse_url
from redis.sentinel import Sentinel, SentinelManagedConnection

SUFFIX: Final = "+sentinel"
SCHEMES: Final = tuple(f"{scheme}{SUFFIX}://" for scheme in ("redis", "rediss"))
PORT: Final = 26379
ASK_S: Final = 1.0  # for an answer of one Sentinel, before the next one is asked


@dataclass(frozen=True)
class Watched:
    """A primary and its Sentinels."""

    sentinels: tuple[tuple[str, int], ...]  # host and port
    name: str
    options: dict[str, Any]  # of connections to the primary
    asking: dict[str, Any]  # of connections to the Sentinels


def checked(url: str) -> str:
    """Return an address that can be used. ValueError otherwise; its text shows no part of the address."""
    try:
        parts = _split(url)[1]
        if parts.fragment or parts.port == 0:
            raise ValueError
    except ValueError:
        reason = "it cannot be read; in its user name and password write # as %23, / as %2F and ? as %3F"
        raise ValueError(reason) from None
    try:
        client(url).connection_pool.make_connection()  # connects to nothing
    except TypeError as error:
        raise ValueError(f"an option after its ? is unknown: {str(error).rpartition(' ')[2]}") from None
    has_database = not _is_watched(url) and parts.scheme != "unix"
    if has_database and not re.fullmatch("/?[0-9]*/?", parts.path):  # else redis-py takes database 0
        raise ValueError("its database should be a number, as in redis://host:6379/1")
    return url


def client(url: str, **options: Any) -> Redis:
    """Return a client. With Sentinels, each of its new connections asks them where the primary is."""
    if not _is_watched(url):
        return Redis.from_url(url, **options)
    watched = _watched(url)
    sentinel = Sentinel(watched.sentinels, sentinel_kwargs=watched.asking)  # type: ignore[no-untyped-call]
    found = sentinel.master_for(watched.name, **watched.options, **options)  # type: ignore[no-untyped-call]
    pool = found.connection_pool
    pool.connection_class = type("Connection", (_AskAgain, pool.connection_class), {})
    return found  # type: ignore[no-any-return]


class _AskAgain(SentinelManagedConnection):
    """A connection that asks the Sentinels before each attempt. redis-py would try the former primary again."""

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        if retry_socket_connect:
            self.connect()  # type: ignore[no-untyped-call]  # which calls this one without
        else:
            super().connect_check_health(check_health, retry_socket_connect)


class _Watching(AsyncRedis):
    """A client that closes its connections to the Sentinels with itself."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        pool: Any = self.connection_pool
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def async_client(url: str, **options: Any) -> AsyncRedis:
    """Return the same for the event loop. It closes its pool with itself."""
    if not _is_watched(url):
        return AsyncRedis.from_pool(AsyncPool.from_url(url, **options))
    watched = _watched(url)
    sentinel = AsyncSentinel(watched.sentinels, sentinel_kwargs=watched.asking)  # type: ignore[no-untyped-call]
    return sentinel.master_for(watched.name, _Watching, **watched.options, **options)  # type: ignore[no-any-return]


def _is_watched(url: str) -> bool:
    return url.startswith(SCHEMES)


def _split(url: str) -> tuple[str, SplitResult]:
    """Return the Sentinels, and the address with `primary` in their place: Python 3.14 takes one host only."""
    if not _is_watched(url):
        return "", urlsplit(url)
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    credentials, at, hosts = authority.rpartition("@")
    return hosts, urlsplit(f"{scheme}://{credentials}{at}primary{slash}{path}")


def _watched(url: str) -> Watched:
    hosts, parts = _split(url)
    name, _, database = parts.path.strip("/").partition("/")
    if not name or not re.fullmatch("[0-9]*", database):
        raise ValueError("its path should be the primary's name, and may have a database: /mymaster or /mymaster/1")
    primary = parts._replace(scheme=parts.scheme.removesuffix(SUFFIX), path=f"/{database}")
    options = parse_url(primary.geturl())  # type: ignore[no-untyped-call]
    del options["host"]
    if options.pop("connection_class", None) is not None:
        options["ssl"] = True
    own = {key: options.pop(f"sentinel_{key}") for key in ("username", "password") if f"sentinel_{key}" in options}
    asking = {"socket_timeout": ASK_S, "socket_connect_timeout": ASK_S, "retry": None, **own}
    return Watched(tuple(map(_host, hosts.split(","))), unquote(name), options, asking)


def _host(text: str) -> tuple[str, int]:
    """Read a host and its port. An IPv6 address stands in brackets."""
    try:
        one = urlsplit(f"//{text}")
        if one.hostname:
            return one.hostname, one.port or PORT
    except ValueError:
        pass
    raise ValueError("its Sentinels cannot be read; wanted redis+sentinel://one:26379,two:26379/mymaster")
