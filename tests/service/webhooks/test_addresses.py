"""Where webhooks may go: no spelling of a private address passes, and what was checked is what is called."""

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from service.settings import Settings
from service.store.jobs import JobStore
from service.webhooks.addresses import AddressNotAllowed, check_url, is_public
from tests.service.webhooks.conftest import Receiver, attempt, create_job, outbox

PUBLIC = "93.184.216.34 2606:2800:220:1::1 ::ffff:93.184.216.34 64:ff9b::93.184.216.34"
NOT_PUBLIC = {
    "of private networks": "10.1.2.3 172.16.0.1 192.168.1.1 127.0.0.1 100.64.0.1 ::1 fe80::1 fc00::1 fec0::1",
    "at which clouds hand out credentials": "169.254.169.254 168.63.129.16 192.0.0.192",
    "reserved": "0.0.0.0 224.0.0.1 255.255.255.255 192.88.99.1 :: ff02::1 3fff::1 5f00::1 2001:2::1",
    "of those, written in IPv6": "::ffff:168.63.129.16 ::ffff:192.0.0.192 ::ffff:10.1.2.3 ::10.1.2.3 ::ffff:0:10.1.2.3",
    "of 6to4 and NAT64": "2002:a01:203:: 64:ff9b::10.1.2.3 64:ff9b:1::10.1.2.3",
}


@pytest.mark.parametrize(
    ("address", "public"),
    [(one, True) for one in PUBLIC.split()] + [(one, False) for few in NOT_PUBLIC.values() for one in few.split()],
)
def test_only_internet_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) == public


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "example.com/hook",
        "http:///hook",
        "http://user@example.com/",
        "http://example.com/#here",
        "http://exämple.com/",
        "http://10.0.0.1/",
        "http://[::1/",
        "http://example.com:0/",
        "http://xn--/",
        f"http://{'a' * 64}.com/",
    ],
)
def test_urls_that_no_webhook_may_have(url: str) -> None:
    with pytest.raises(AddressNotAllowed):
        check_url(url, allow_private=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433"])
def test_nothing_is_sent_to_this_machine_unless_private_addresses_are_allowed(
    start: Callable[..., Receiver], hooked: Settings, store: JobStore, host: str
) -> None:
    receiver = start(200)
    strict = hooked.model_copy(update={"webhook_allow_private": False})
    for chosen, received in ((strict, 0), (hooked, 1)):
        store.cancel(job_id := create_job(store, f"http://{host}:{receiver.port}/"))
        attempt(chosen, job_id, "cancelled")
        assert outbox(store) == []
        assert len(receiver.got()) == received


def test_a_name_is_resolved_once_and_the_checked_address_is_called(
    start: Callable[..., Receiver], store: JobStore, hooked: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = start(200)
    asked = list[str]()

    look_up = socket.getaddrinfo

    def once(host: Any, port: int, *arguments: Any, **options: Any) -> Any:
        if host != "receiver.example":
            return look_up(host, port, *arguments, **options)
        asked.append(host)
        assert len(asked) == 1, "a second answer could be another"
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", once)
    store.cancel(job_id := create_job(store, f"http://receiver.example:{receiver.port}/"))
    attempt(hooked, job_id, "cancelled")
    assert asked == ["receiver.example"]
    assert [message["headers"]["host"] for message in receiver.got()] == [f"receiver.example:{receiver.port}"]


@pytest.mark.parametrize(("name", "received"), [("receiver.example", 1), ("other.example", 0)])
def test_the_certificate_is_checked_for_the_name(
    start: Callable[..., Receiver], store: JobStore, hooked: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    name: str, received: int,
) -> None:  # fmt: skip
    authority, certificate = trustme.CA(), tmp_path / "certificate.pem"
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(certificate)
    receiver = start(200, certificate=certificate)

    look_up = socket.getaddrinfo

    def resolved(host: Any, port: int, *arguments: Any, **options: Any) -> Any:
        return look_up("127.0.0.1" if host == "receiver.example" else host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    store.cancel(job_id := create_job(store, f"https://receiver.example:{receiver.port}/"))
    attempt(hooked, job_id, "cancelled")
    assert len(receiver.got()) == received
    assert (outbox(store) == []) == bool(received)
