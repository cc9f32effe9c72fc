"""docker-compose.yml agrees with the code; `make compose-test` and `make kubernetes-check` test the deployments."""

import ipaddress
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis import Redis

from deploy.prometheus_rule import document
from service.settings import Settings
from service.webhooks.addresses import is_public
from tests.paths import ROOT

PRIVATE = ("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12")
PRIVATE += ("192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
COMPOSE_FILES = ["docker-compose.yml", "docker-compose.gpu.yml", "docker-compose.s3.yml"]
OF_THE_IMAGES = {"LABELGRID_ALIVE_FILE", "LABELGRID_CACHE", "LABELGRID_LOG_FORMAT"}


def setting_names() -> set[str]:
    """Return the environment variables of all settings."""
    return {f"LABELGRID_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("name", SERVICES)
def test_variables_of_a_service_are_settings(name: str) -> None:
    asked = {variable for variable in SERVICES[name].get("environment", {}) if variable.startswith("LABELGRID_")}
    assert asked <= setting_names()


def test_compose_passes_every_setting_that_a_page_names() -> None:
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name != "settings.md"]
    named = {name for page in pages for name in re.findall(r"LABELGRID_[A-Z_]+", page.read_text())} & setting_names()
    assert len(named) > 20
    passed = set[str]()
    for file in COMPOSE_FILES:
        for service in yaml.safe_load((ROOT / file).read_text())["services"].values():
            passed |= service.get("environment", {}).keys()
    # stop_grace_period goes with the default
    assert named - passed - OF_THE_IMAGES - {"LABELGRID_DRAIN_S"} == set()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_capabilities(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
    assert service.get("read_only") is True or name == "trainer"
    assert "privileged" not in service
    assert "cap_add" not in service


def test_no_policy_of_kubernetes_lets_a_webhook_reach_a_private_network() -> None:
    path = ROOT / "deploy" / "kubernetes" / "base" / "network-policies.yaml"
    (policy,) = [one for one in yaml.safe_load_all(path.read_text()) if one["metadata"]["name"] == "webhooks"]
    blocks = [peer["ipBlock"] for rule in policy["spec"]["egress"] for peer in rule["to"]]
    closed = [ipaddress.ip_network(one) for block in blocks for one in block["except"]]
    assert not any(is_public(network[0]) or is_public(network[-1]) for network in closed)
    for network in map(ipaddress.IPv4Network, PRIVATE):
        assert any(network.version == one.version and network.subnet_of(one) for one in closed), network  # type: ignore[arg-type]


def test_kubernetes_has_the_alerts() -> None:
    rules = ROOT / "deploy/kubernetes/components/prometheus/rules.yaml"
    assert rules.read_text() == document()
    groups = yaml.safe_load((ROOT / "deploy/monitoring/alerts.yml").read_text())["groups"]
    assert yaml.safe_load(document())["spec"] == {"groups": groups}


def test_redis_keeps_jobs_alike_wherever_we_start_it(connection: Redis) -> None:
    path = ROOT / "deploy" / "kubernetes" / "base" / "redis.yaml"
    (pod,) = [one for one in yaml.safe_load_all(path.read_text()) if one["kind"] in ("Deployment", "StatefulSet")]
    (container,) = pod["spec"]["template"]["spec"]["containers"]

    def options(command: list[str]) -> dict[str, str]:
        own = ("--requirepass", "--dir", "--maxmemory")
        pairs = zip(command[1::2], command[2::2], strict=True)
        return {name.removeprefix("--"): value for name, value in pairs if name not in own}

    in_compose = options(SERVICES["redis"]["command"])
    assert options(container["args"]) == in_compose
    assert {name: connection.config_get(name)[name] for name in in_compose} == in_compose


@pytest.mark.parametrize("name", ["api", "worker"])
def test_pictures_lie_on_a_volume(name: str) -> None:
    service = SERVICES[name]
    assert "LABELGRID_KEEP_DAYS" in {variable for variable, value in service["environment"].items() if value is None}
    assert "${PICTURES:-pictures}:/pictures" in service["volumes"]  # not `:ro`: the API deletes jobs
    lines = (ROOT / f"Dockerfile.{name}").read_text().split(f" AS {name}\n")[-1].splitlines()
    made = next(i for i, line in enumerate(lines) if "install -d -o 10001 /pictures" in line)
    assert "USER 10001" in lines[made:]
    assert "USER 10001" not in lines[:made]


@pytest.mark.parametrize("file", ["docker-compose.yml", "docker-compose.s3.yml"])
def test_variables_that_compose_takes_are_named_at_its_top(file: str) -> None:
    text = (ROOT / file).read_text()
    head = text.partition("\nname:")[0].partition("\nx-")[0]  # the comment
    taken = {re.split(r":|}", part)[0] for part in text.split("${")[1:]}
    assert {name for name in taken if name not in head} == set()


def test_kubernetes_restarts_no_worker_because_redis_is_away() -> None:
    pod = next(yaml.safe_load_all((ROOT / "deploy/kubernetes/base/worker.yaml").read_text()))
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    assert {name for name in container if name.endswith("Probe")} == {"readinessProbe"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_limits_of_memory_and_processes(name: str) -> None:
    assert SERVICES[name]["mem_limit"]
    assert int(SERVICES[name]["pids_limit"]) <= 1000


@pytest.mark.parametrize("image", ["api", "worker"])
def test_no_image_mixes_package_indexes(image: str) -> None:
    commands = [line for line in (ROOT / f"Dockerfile.{image}").read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in commands if "--extra-index-url" in line]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_what_runs_on_github_is_pinned_and_may_write_only_what_it_publishes(workflow: Path) -> None:
    """A tag can be moved to other code, and code that may write could publish itself."""
    text = workflow.read_text()
    uses = re.findall(r"uses: (.+)", text)
    assert [one for one in uses if not re.fullmatch(r"\S+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", one)] == []
    content = yaml.safe_load(text)
    assert content["permissions"] in ({}, {"contents": "read"})
    for name, job in content["jobs"].items():
        writes = {what for what, access in job.get("permissions", {}).items() if access == "write"}
        assert writes <= {"publish": {"contents"}, "publish-docs": {"pages", "id-token"}, "images": {"packages"}}.get(
            name, set()
        )
        if "contents" in writes or "pages" in writes:  # nothing of the repository runs there
            assert not [step for step in job["steps"] if "actions/checkout" in step.get("uses", "")]
    checkouts = [s for job in content["jobs"].values() for s in job["steps"] if "actions/checkout" in s.get("uses", "")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)
