"""Runs every block of shell in README.md and the tracks of docs/, as a reader would on empty machines.

`make pages-test`. A machine is a set of Linux namespaces: its network, name, processes, and its own layer over /etc,
/root and the like, so that nothing stays. There is no internet in there: INSTEAD lists what is replaced for that
reason, and what would take hours. Packages are those of this machine; `deploy/any_machine.sh` and
`make wheel-test` install them into empty ones. Needs root, and Debian's redis-server, nginx, prometheus,
prometheus-alertmanager, openssl and curl.
"""

import contextlib
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.local.redis_server import die_with_parent
from tests.service.processes import children, until

ROOT = Path(__file__).parents[1]
VENV = (ROOT / ".venv").resolve()
COURSE = ROOT.parent / "shared" / "iclevr"
ROUTER, S3_PORT = "10.77.1.254", 5000
LAYERS = ("etc", "opt", "var", "root", "run", "tmp", "mnt")

CLONE = f"git clone --quiet --depth 1 file://{ROOT}"
INSTALLED = "touch --date=2000-01-01 pyproject.toml lock/*.txt"  # older than .venv, lest make install anew
SERVE = """\
test -z "${SERVER:-}" || { kill $SERVER; while curl -s localhost:8000/healthz >/dev/null; do sleep 0.2; done; }
labelgrid serve > /run/serve.log 2>&1 & SERVER=$!
until grep -q "is ready" /run/serve.log; do kill -0 $SERVER || { cat /run/serve.log; exit 1; }; sleep 0.5; done
"""
# What a line has, and what is run in its place.
INSTEAD = {
    # no internet
    r"^(sudo )?apt-get .*": ":",
    r"^export TORCH_INDEX=.*": ":",
    r"git clone --depth 1 REPOSITORY labelgrid && cd labelgrid": f"{CLONE} labelgrid && cd labelgrid "
    f"&& ln -s {VENV} .venv && export PYTHONPATH=$PWD && . .venv/bin/activate && {INSTALLED}",
    r"git clone --depth 1 REPOSITORY /opt/labelgrid": f"{CLONE} /opt/labelgrid",
    r"^make \.venv/\S+( \.venv/\S+)* && ": "",
    r"python3 -m venv \.venv && sh lock/install\.sh .*": f"ln -s {VENV} .venv",
    r"trainer import SOURCE mydata": "trainer import emoji mydata",
    r"python examples/emoji_set\.py emoji\b.*": "cp -r /mnt/emoji emoji",
    r"https://s3\.example\.org": f"http://{ROUTER}:{S3_PORT}",
    r"(AWS_\w+)=\.\.\.": r"\1=test",
    r"https://pager\.example\.org/your-address": f"http://{ROUTER}:9000/pager",
    # done by `fetch` below
    r"^scp .*": ":",
    # processes that serve until Ctrl-C
    r"^(make serve|labelgrid serve|python -m service)\b.*": SERVE,
    # CI does that
    r"^make test\b": "make --dry-run test",
    # hours become seconds
    r"train denoiser": "train denoiser --set layout_steps=2",
    r"--minutes \d+": "--steps 2 --set batch=8",
    r"--scenes \d+": "--scenes 8",
    r"--train lab/train\.json": "--train lab/few.json",
    r"--repeats \d+": "--repeats 1",
    r"systemctl restart prometheus prometheus-alertmanager": "sed -i 's/for: .*/for: 3s/' /etc/prometheus/alerts.yml; "
    "sed -i 's/: 15s/: 1s/' /etc/prometheus/prometheus.yml; "
    r"sed -i 's/^route:/route:\\n  group_wait: 0s\\n  group_interval: 1s/' /etc/prometheus/alertmanager.yml; "
    "systemctl restart prometheus prometheus-alertmanager",
}


@dataclass(frozen=True)
class Block:
    """Commands of a page, as they are there."""

    page: str
    line: int
    text: str
    hosts: tuple[str, ...]


def blocks(page: str) -> list[Block]:
    """Return the blocks of shell (indented) and of Python (fenced) of a page, in order.

    A first line such as `# host-a and host-b` says where they are run.
    """
    found = []
    text = re.sub(r"^```(\w*)\n(.*?)^```$", _indented, (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"(?:^ {4}[^\n]*\n(?:\n(?= {4}))?)+", text, re.MULTILINE):
        number = text.count("\n", 0, match.start()) + 1
        for part in re.split(rf"(?m)^(?=# host|{PYTHON})", re.sub("(?m)^ {4}", "", match[0])):
            if part.strip():
                hosts = re.findall(r"host-\w", part.partition("\n")[0]) if part.startswith("# host") else ["host-a"]
                found.append(Block(page, number, part, tuple(hosts)))
    return found


PYTHON = "python - <<'END_OF_BLOCK'"


def _indented(fence: "re.Match[str]") -> str:
    """Write a fenced block of Python as one of shell that runs it; empty others, of which only the lines are left."""
    language, text = fence.groups()
    if language != "python":
        return "\n" * (text.count("\n") + 1)
    return re.sub("(?m)^", "    ", f"{PYTHON}\n{text}END_OF_BLOCK")


def replaced(text: str) -> str:
    for pattern, instead in INSTEAD.items():
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    return text


@dataclass(frozen=True)
class Machine:
    name: str
    pid: int  # of its first process

    def run(self, command: str, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        inside = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", "--"]
        return subprocess.run([*inside, command, *arguments], text=True, **options)

    def type(self, block: Block) -> str:
        """Run a block where and with the variables with which the last one ended. Return its output."""
        script = replaced(block.text)
        script = f". /run/state\nset -e -a\n{script}\nset -a\n{{ export -p; echo cd \"'$PWD'\"; }} > /run/state\n"
        done = self.run("sh", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        where = f"{block.page}:{block.line} on {self.name}"
        assert done.returncode == 0, (
            f"{where} ended with {done.returncode}:\n{script}\n{done.stdout[-3000:]}{self.logs()}"
        )
        return done.stdout

    def logs(self) -> str:
        return self.run(
            "sh", "-c", "tail -n 15 /run/units/*.log /run/serve.log 2>/dev/null", stdout=subprocess.PIPE
        ).stdout


@contextlib.contextmanager
def machine(name: str, address: str) -> Iterator[Machine]:
    """Run an empty machine with a cable to the bridge, until the context ends."""
    layers = "".join(
        f"mkdir -p /mnt/{one} /mnt/{one}-work; mount -t overlay overlay "
        f"-o lowerdir=/{one},upperdir=/mnt/{one},workdir=/mnt/{one}-work /{one}; "
        for one in LAYERS
        if one != "mnt"
    )
    script = f"hostname {name}; mount -t tmpfs tmpfs /mnt; {layers} ip link set lo up; echo there; exec sleep infinity"
    line = [
        "unshare",
        "--net",
        "--uts",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-ec",
        script,
    ]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent) as process:
        cable = f"cable-{name}"
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "there\n"
            (pid,) = children(process.pid)
            one = Machine(name, pid)
            for command in (
                f"ip link add {cable} type veth peer name eth0 netns {pid}",
                f"ip link set {cable} master bridge up",
                f"nsenter --target {pid} --net ip address add {address}/24 dev eth0",
                f"nsenter --target {pid} --net ip link set eth0 up",
            ):
                subprocess.run(command.split(), check=True)
            systemctl = f'#!/bin/sh\nexec {VENV}/bin/python /opt/labelgrid/deploy/systemctl.py "$@"\n'
            one.run(
                "sh", "-c", "mkdir -p /run/bin; cat > /run/bin/systemctl; chmod +x /run/bin/systemctl", input=systemctl
            )
            variables = {
                "PATH": "/run/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME": "/root",
                "PYTHONPATH": "/opt/labelgrid",  # our packages are those of the clone, not those of .venv
                "OMP_NUM_THREADS": "1",
                "LABELGRID_DEVICE": "cpu",
                "GIT_CONFIG_COUNT": "1",
                "GIT_CONFIG_KEY_0": "safe.directory",
                "GIT_CONFIG_VALUE_0": "*",
            }
            state = "".join(f"export {name}='{value}'; " for name, value in variables.items()) + "cd /root"
            one.run("sh", "-c", "cat > /run/state", input=state)
            yield one
        finally:
            process.kill()
            subprocess.run(["ip", "link", "delete", cable], check=False)  # lest the next machine of that name finds it


@pytest.fixture(scope="module")
def bridge() -> None:
    for command in (
        "ip link set lo up",
        "ip link add bridge type bridge",
        f"ip address add {ROUTER}/24 dev bridge",
        "ip link set bridge up",
    ):
        subprocess.run(command.split(), check=True)


@pytest.fixture
def machines(bridge: None) -> Iterator[dict[str, Machine]]:
    with contextlib.ExitStack() as stack:
        found: dict[str, Machine] = {}
        for number, name in enumerate(("host-a", "host-b"), 1):
            found[name] = stack.enter_context(machine(name, f"10.77.1.{number}"))
        yield found


def fetch(block: Block, to: Machine, machines: dict[str, Machine]) -> None:
    """Do what the block's lines with scp do."""
    for sources, folder in re.findall(r"^scp (?:-p )?(.+) (\S+/)$", block.text, re.MULTILINE):
        for source in sources.split():
            host, _, path = source.partition(":")
            there = machines[host].run(
                "cat", path if path[0] == "/" else f"/root/{path}", stdout=subprocess.PIPE, check=True
            )
            to.run("sh", "-c", f"cat > {folder}/{Path(path).name}", input=there.stdout, check=True)


def type_all(page: str, machines: dict[str, Machine]) -> str:
    """Run a page's blocks in order, and return their output."""
    output = ""
    found = blocks(page)
    assert found
    for block in found:
        for host in block.hosts:
            fetch(block, machines[host], machines)
            output += machines[host].type(block)
    return output


def file(machine: Machine, path: str) -> bytes:
    line = ["nsenter", f"--target={machine.pid}", "--mount", "--", "cat", path]
    return subprocess.run(line, check=True, capture_output=True).stdout


PNG = b"\x89PNG"
DRAW_EMOJI = """\
mkdir -p /mnt/emoji/pictures
python - <<END
import itertools, json, pathlib
from PIL import Image
folder = pathlib.Path("/mnt/emoji")
skins, people, doing = ["medium skin", "light skin"], ["man", "woman"], ["surfing", "cook", "judge"]
lines = []
for i, labels in enumerate(itertools.product(skins, people, doing)):
    Image.new("RGB", (64, 64), (20 * i, 255 - 20 * i, 99)).save(folder / f"pictures/{i}.png")
    lines.append(json.dumps({"file_name": f"pictures/{i}.png", "labels": labels}))
(folder / "metadata.jsonl").write_text("\\n".join(lines))
(folder / "held-out.txt").write_text("pictures/0.png\\npictures/7.png\\n")
END
"""


def test_the_readme(machines: dict[str, Machine]) -> None:
    output = type_all("README.md", machines)
    assert "1.0" in output
    assert file(machines["host-a"], "/root/labelgrid/grid.png").startswith(PNG)


@pytest.mark.skipif(not COURSE.is_dir(), reason="the course's label files are not here")
def test_the_lab(machines: dict[str, Machine]) -> None:
    """With few label lists, and our evaluator in the form of the course's."""
    one = machines["host-a"]
    lists = json.loads((COURSE / "train.json").read_text())
    few = json.dumps(dict(list(lists.items())[:24]))
    one.run("mkdir", "-p", "/root/labelgrid-lab", check=True)
    for name in ("objects.json", "train.json", "test.json", "new_test.json"):
        text = (COURSE / name).read_text()
        one.run("sh", "-c", f"cat > /root/labelgrid-lab/{name}", input=text, check=True)
    one.run("sh", "-c", "cat > /root/labelgrid-lab/few.json", input=few, check=True)
    clone, *others = [block for block in blocks("docs/lab.md") if "apt-get" not in block.text]
    one.type(clone)
    export = "mv ../labelgrid-lab lab; python -m trainer export iclevr-resnet18 lab/checkpoint.pth\n"
    one.type(Block("lab", 0, export, ("host-a",)))
    for block in others:
        one.type(block)
    for grid in ("test.png", "new_test.png", "mine.png"):
        assert file(one, f"/root/labelgrid/{grid}").startswith(PNG)


def test_your_own_pictures(machines: dict[str, Machine], tmp_path: Path) -> None:
    """With twelve drawn squares instead of the emoji, which are on the internet."""
    one = machines["host-a"]
    one.type(blocks("README.md")[0])
    one.type(Block("own-data", 0, DRAW_EMOJI, ("host-a",)))
    for block in blocks("docs/own-data.md"):
        one.type(block)
    for picture in ("surfing.png", "grid.png"):
        assert file(one, f"/root/labelgrid/{picture}").startswith(PNG)


def test_two_hosts(machines: dict[str, Machine]) -> None:
    told: list[tuple[str, str, str]] = []

    class Pager(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            for alert in json.loads(self.rfile.read(int(self.headers["content-length"])))["alerts"]:
                labels = alert["labels"]
                told.append((labels["alertname"], labels.get("instance", ""), alert["status"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    s3 = [str(VENV / "bin/python"), "-m", "moto.server", "-H", ROUTER, "-p", str(S3_PORT)]
    with (
        ThreadingHTTPServer((ROUTER, 9000), Pager) as server,
        subprocess.Popen(s3, stderr=subprocess.DEVNULL) as storage,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:

            def answers() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return httpx.get(f"http://{ROUTER}:{S3_PORT}").status_code < 500
                return False

            until(answers)
            for bucket in ("models", "pictures"):
                assert httpx.put(f"http://{ROUTER}:{S3_PORT}/{bucket}").status_code == 200
            *before, stop, start = blocks("docs/two-hosts.md")
            for block in before:
                for host in block.hosts:
                    fetch(block, machines[host], machines)
                    machines[host].type(block)
            assert file(machines["host-b"], "/root/grid.png").startswith(PNG)
            for block, status in ((stop, "firing"), (start, "resolved")):
                machines["host-b"].type(block)
                until(lambda wanted=status: ("LabelgridProcessDown", "host-b:9464", wanted) in told, timeout_s=240)
        finally:
            server.shutdown()
            storage.kill()
