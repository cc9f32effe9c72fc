"""The proxy for clients elsewhere: a real nginx with deploy/public/nginx.conf before a real API, and the same limits in
Kubernetes."""

import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme
import yaml

from service.files import PictureFiles, picture_name
from service.settings import Settings
from service.store.jobs import JobStore
from tests.conftest import api_server
from tests.paths import ROOT
from tests.service.processes import until

CONFIGURATION = ROOT / "deploy/public/nginx.conf"
HEAD = b"POST /generate HTTP/1.1\r\nHost: labelgrid.example.org\r\n"


def port_of(test_socket: socket.socket) -> int:
    port: int = test_socket.getsockname()[1]
    return port


class Proxy:
    """nginx, with shorter times and fewer connections, on ports of its own."""

    def __init__(self, folder: Path, api: int, authority: trustme.CA) -> None:
        with socket.create_server(("127.0.0.1", 0)) as plain, socket.create_server(("127.0.0.1", 0)) as secure:
            self.plain, self.secure = port_of(plain), port_of(secure)
        certificate = authority.issue_cert("labelgrid.example.org", "127.0.0.1")
        certificate.cert_chain_pems[0].write_to_path(folder / "fullchain.pem")
        certificate.private_key_pem.write_to_path(folder / "privkey.pem")
        text = CONFIGURATION.read_text()
        for name, here in (
            ("/tmp/", f"{folder}/"),
            ("/certificates/", f"{folder}/"),
            ("api:8000", f"127.0.0.1:{api}"),
            ("listen 8080", f"listen 127.0.0.1:{self.plain}"),
            ("listen 8443", f"listen 127.0.0.1:{self.secure}"),
            ("client_header_timeout 10s", "client_header_timeout 3s"),
            ("client_body_timeout 30s", "client_body_timeout 1s"),
            ("send_timeout 60s", "send_timeout 300ms"),
            ("limit_conn connections 100", "limit_conn connections 5"),
        ):
            assert name in text, name
            text = text.replace(name, here)
        (folder / "nginx.conf").write_text(text)
        command = ["nginx", "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.tls = ssl.create_default_context()
        authority.configure_trust(self.tls)
        self.client = httpx.Client(base_url=f"https://127.0.0.1:{self.secure}", verify=self.tls, timeout=30)
        until(self._answers)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
        with socket.socket() as test_socket:
            return test_socket.connect_ex(("127.0.0.1", self.secure)) == 0

    def connect(self) -> ssl.SSLSocket:
        return self.tls.wrap_socket(
            socket.create_connection(("127.0.0.1", self.secure), timeout=30), server_hostname="127.0.0.1"
        )

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.communicate()


@pytest.fixture
def proxy(settings: Settings, alive: JobStore, tmp_path: Path) -> Iterator[Proxy]:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    with api_server(settings.model_copy(update={"allow_no_keys": True})) as server:
        one = Proxy(tmp_path, port_of(server.servers[0].sockets[0]), trustme.CA())
        try:
            yield one
        finally:
            one.stop()


def test_requests_reach_the_api(proxy: Proxy) -> None:
    answer = proxy.client.post("/generate", json={"labels": [["red cube"]]}, headers={"prefer": "respond-async"})
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    compressed = proxy.client.get("/models", headers={"accept-encoding": "gzip"})
    assert compressed.headers["content-encoding"] == "gzip"
    assert compressed.json()["models"]
    assert proxy.client.get("/metrics").status_code == 404
    plain = httpx.get(f"http://127.0.0.1:{proxy.plain}/labels?model=toy")
    assert (plain.status_code, plain.headers["location"]) == (308, "https://127.0.0.1/labels?model=toy")


def test_events_arrive_while_the_job_waits(proxy: Proxy) -> None:
    body, headers = {"labels": [["red cube"]]}, {"prefer": "respond-async"}
    job_id = proxy.client.post("/generate", json=body, headers=headers).json()["id"]
    with proxy.client.stream("GET", f"/jobs/{job_id}/events") as answer:
        assert next(answer.iter_lines()).startswith("event: job")


def test_clients_that_stop_in_the_middle_lose_their_connections(proxy: Proxy) -> None:
    half_a_header, half_a_body = HEAD[:-10], HEAD + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with proxy.connect() as one, proxy.connect() as two, proxy.connect() as three:
        for slow, sent in ((one, b""), (two, half_a_header), (three, half_a_body)):
            slow.sendall(sent)
        for slow in (one, two, three):
            while slow.recv(4096):  # which waits for less time than nginx does by itself
                pass


def test_long_headers_and_long_bodies_are_refused(proxy: Proxy) -> None:
    assert proxy.client.get("/healthz", headers={"x-long": "x" * 20_000}).status_code in (400, 431)
    with proxy.connect() as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (34 << 20))
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_does_not_read_its_answer_loses_it(proxy: Proxy, settings: Settings) -> None:
    large, files = bytes(32 << 20), PictureFiles(settings.pictures)  # more than the system's buffers take
    body, headers = {"labels": [["red cube"]]}, {"prefer": "respond-async"}
    job_id = proxy.client.post("/generate", json=body, headers=headers).json()["id"]
    files.write(job_id, picture_name(0), large)
    with proxy.connect() as client:
        client.sendall(f"GET /jobs/{job_id}/images/0.png HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        received = len(client.recv(1 << 20))
        time.sleep(1)
        try:
            while part := client.recv(1 << 20):
                received += len(part)
        except (ConnectionResetError, ssl.SSLError):
            pass
    files.remove(job_id)
    assert 1 << 14 < received < len(large)


def test_one_address_has_few_connections(proxy: Proxy) -> None:
    body, headers = {"labels": [["red cube"]]}, {"prefer": "respond-async"}
    job_id = proxy.client.post("/generate", json=body, headers=headers).json()["id"]
    follow = f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    held, answers = list[ssl.SSLSocket](), list[bytes]()
    try:
        for _ in range(6):
            held.append(proxy.connect())
            held[-1].sendall(follow)
            answers.append(held[-1].recv(4096)[:12])
        assert answers == [b"HTTP/1.1 200"] * 5 + [b"HTTP/1.1 429"]
    finally:
        for one in held:
            one.close()


def test_kubernetes_has_the_same_limits() -> None:
    ingress = yaml.safe_load((ROOT / "deploy/kubernetes/components/public/ingress.yaml").read_text())
    about = ingress["metadata"]["annotations"]
    text = CONFIGURATION.read_text()

    def limit(name: str) -> str:
        (found,) = re.findall(rf"^\s*{name} (.*?);", text, re.MULTILINE)
        return str(found)

    assert about["nginx.org/client-max-body-size"] == limit("client_max_body_size")
    assert about["nginx.org/proxy-read-timeout"] == limit("proxy_read_timeout")
    assert f"rate={about['nginx.org/limit-req-rate']}" in limit("limit_req_zone")
    assert f"burst={about['nginx.org/limit-req-burst']}" in limit("limit_req")
    snippets = about["nginx.org/server-snippets"] + about["nginx.org/location-snippets"]
    for name, value in re.findall(r"^(\w+) (.*);", snippets, re.MULTILINE):
        assert value == limit(name)
