"""deploy/kubernetes as kustomize builds it, checked against the code and the schemas of Kubernetes and two operators.

`make kubernetes-check`. Needs kustomize, or kubectl, which has it inside. No cluster is asked.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus
from typer.main import get_command

from service.__main__ import app
from service.api.app import create_app
from service.settings import Settings
from service.telemetry import metrics
from tests.test_deployment import setting_names
from trainer.__main__ import app as trainer

KUBERNETES = Path(__file__).parent / "kubernetes"
OVERLAYS = sorted(folder.name for folder in (KUBERNETES / "overlays").iterdir())
OLDEST, NEWEST = "1.30", "1.37"

SECRET = {
    "REDIS_PASSWORD": "letters",
    "LABELGRID_API_KEYS": f"alice:{'0' * 64}",
    "LABELGRID_WEBHOOK_SECRET": "letters",
    "KEDA_API_KEY": "lg_letters",
    "PROMETHEUS_API_KEY": "lg_letters",
    "AWS_ACCESS_KEY_ID": "letters",
    "AWS_SECRET_ACCESS_KEY": "letters",
}
OTHERS = {"keda.sh": keda, "monitoring.coreos.com": prometheus}  # groups that are not Kubernetes' own
Object = dict[str, Any]


def build(folder: Path) -> list[Object]:
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    done = subprocess.run([*command, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # kustomize prints deprecation warnings there
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the folder, with a secret for every overlay."""
    folder = tmp_path_factory.mktemp("kubernetes") / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    for overlay in OVERLAYS:
        lines = [f"{name}={value}\n" for name, value in SECRET.items()]
        (folder / "overlays" / overlay / "secret.env").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module", params=[*OVERLAYS, "with optional components"])
def objects(request: pytest.FixtureRequest, copy: Path) -> list[Object]:
    if request.param in OVERLAYS:
        return build(copy / "overlays" / request.param)
    return build(with_components(copy, "gpu", "prometheus"))


def with_components(copy: Path, *names: str) -> Path:
    """Return the folder of an overlay: production with more components."""
    folder = copy / "overlays" / "-".join(names)
    folder.mkdir(exist_ok=True)
    components = ", ".join(f"../../components/{name}" for name in names)
    (folder / "kustomization.yaml").write_text(f"resources: [../production]\ncomponents: [{components}]\n")
    return folder


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [one for one in objects if one["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = (one for one in of_kind(objects, kind) if one["metadata"]["name"] == name)
    return found


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """The pod specifications, by the name of their owner."""
    for one in of_kind(objects, "Deployment", "StatefulSet"):
        yield one["metadata"]["name"], one["spec"]["template"]["spec"]


def containers(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for name, pod in pods(objects):
        (container,) = pod["containers"]
        yield name, container


def validate(objects: list[Object]) -> None:
    for one in objects:
        group = one["apiVersion"].partition("/")[0]
        if group in OTHERS:
            read = getattr(OTHERS[group], one["kind"]).model_validate(one)
            # Fields that the schema does not know are dropped.
            assert read.model_dump(mode="json", by_alias=True, exclude_unset=True) == one
        else:
            for version in (OLDEST, NEWEST):
                kubernetes_validate.validate(one, version, strict=True)


def test_every_object_is_as_its_schema_says(objects: list[Object]) -> None:
    validate(objects)


def test_the_pod_that_fills_the_volume_is_as_its_schema_says() -> None:
    pod = yaml.safe_load((KUBERNETES / "components" / "models-volume" / "fill.yaml").read_text())
    for version in (OLDEST, NEWEST):
        kubernetes_validate.validate(pod, version, strict=True)


def test_the_checks_refuse_what_is_wrong(objects: list[Object]) -> None:
    wrong = yaml.safe_load(yaml.safe_dump(named(objects, "Deployment", "api")))
    wrong["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPorts"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="containerPorts"):
        kubernetes_validate.validate(wrong, NEWEST, strict=True)


def test_pods_are_restricted(objects: list[Object]) -> None:
    """Pods satisfy the "restricted" profile of the Pod Security Standards, which the namespace enforces, and more."""
    assert named(objects, "Namespace", "labelgrid")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == (
        "restricted"
    )
    for name, pod in pods(objects):
        restricted(pod)
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert mounts.get("models", {"readOnly": True})["readOnly"] is True
        assert pod["terminationGracePeriodSeconds"] >= 30
        assert ("livenessProbe" in container) == (name != "worker")


def restricted(pod: Object) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "tmp" in {volume["name"] for volume in pod["volumes"]}
    assert "tmp" in {mount["name"] for mount in container["volumeMounts"]}
    assert container["resources"]["limits"]["memory"]


def test_variables_are_settings_and_probes_are_routes(objects: list[Object]) -> None:
    known = setting_names()
    routes = create_app(Settings()).openapi()["paths"].keys()
    for name, container in containers(objects):
        asked = {variable["name"] for variable in container["env"]}
        assert {variable for variable in asked if variable.startswith("LABELGRID_")} <= known, name
        if name != "redis":
            assert "LABELGRID_REDIS_URL" in asked
        ports = {port["name"] for port in container["ports"]} if "ports" in container else set()
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "httpGet" in container.get(probe, {}):
                assert container[probe]["httpGet"]["path"] in routes
                assert container[probe]["httpGet"]["port"] in ports
            elif name != "redis" and probe in container:
                assert container[probe]["exec"]["command"] == ["python", "-m", "service", "check"]
        if "command" in container:
            assert container["command"][:3] == ["python", "-m", "service"]
            command, *options = container["command"][3:]
            get_command(app).commands[command].make_context(command, options)  # raises what the service would
    for config in of_kind(objects, "ConfigMap"):
        assert {key for key in config["data"] if key.startswith("LABELGRID_")} <= known


def test_what_names_something_finds_it(objects: list[Object]) -> None:
    secret, *others = of_kind(objects, "Secret")
    assert not others
    labels = {
        one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"]
        for one in of_kind(objects, "Deployment", "StatefulSet")
    }
    ports = {name: {port["name"] for port in one.get("ports", [])} for name, one in containers(objects)}

    def chosen(selector: dict[str, Any]) -> set[str]:
        wanted = selector.get("matchLabels", {}).items()
        rules = selector.get("matchExpressions", [])
        return {
            name
            for name, has in labels.items()
            if wanted <= has.items() and all(has.get(rule["key"]) in rule["values"] for rule in rules)
        }

    for one in of_kind(objects, "Service"):
        name = one["metadata"]["name"]
        assert chosen({"matchLabels": one["spec"]["selector"]}) == {name}
        assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports[name]
    for one in of_kind(objects, "Deployment", "StatefulSet", "PodDisruptionBudget"):
        assert chosen(one["spec"]["selector"]) == {one["metadata"]["name"]}
    for one in of_kind(objects, "NetworkPolicy"):
        receiving = chosen(one["spec"]["podSelector"])
        assert receiving
        for rule in one["spec"].get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= set.union(*(ports[name] for name in receiving))
    for name, container in containers(objects):
        refs = [
            variable["valueFrom"]["secretKeyRef"] for variable in container["env"] if "secretKeyRef" in str(variable)
        ]
        assert {ref["name"] for ref in refs} == {secret["metadata"]["name"]}, name
        assert {ref["key"] for ref in refs} <= secret["data"].keys()


def test_keda_reads_a_metric_that_there_is_with_a_key_of_the_secret(copy: Path) -> None:
    objects = build(copy / "overlays" / "production")
    spec = named(objects, "ScaledObject", "worker")["spec"]
    worker = named(objects, "Deployment", spec["scaleTargetRef"]["name"])
    assert "replicas" not in worker["spec"]  # it and KEDA would undo each other's changes
    assert spec["minReplicaCount"] == 0
    environment = {one["name"]: one.get("value") for one in dict(containers(objects))["api"]["env"]}
    assert environment["LABELGRID_ACCEPT_WITHOUT_WORKERS"] == "true"
    (trigger,) = spec["triggers"]
    gauges = {family.name for family in metrics.API.collect() if family.type == "gauge"}
    assert trigger["metadata"]["valueLocation"] in gauges
    (port,) = named(objects, "Service", "api")["spec"]["ports"]
    assert trigger["metadata"]["url"] == f"http://api.labelgrid.svc:{port['port']}/metrics"
    (reference,) = named(objects, "TriggerAuthentication", trigger["authenticationRef"]["name"])["spec"][
        "secretTargetRef"
    ]
    (secret,) = of_kind(objects, "Secret")
    assert reference["name"] == secret["metadata"]["name"]
    assert reference["key"] in secret["data"]


def test_prometheus_scrapes_ports_that_there_are_under_the_names_of_the_alerts(copy: Path) -> None:
    objects = build(with_components(copy, "prometheus"))
    (secret,) = of_kind(objects, "Secret")
    scraped = yaml.safe_load((KUBERNETES.parent / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
    monitors = of_kind(objects, "PodMonitor")
    assert {one["metadata"]["name"] for one in monitors} == {"api", "worker"}
    for one in monitors:
        name = one["metadata"]["name"]
        template = named(objects, "Deployment", name)["spec"]["template"]
        assert one["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        (endpoint,) = one["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        (relabeling,) = endpoint["relabelings"]
        assert relabeling["replacement"] in {config["job_name"] for config in scraped}
        if name == "api":
            credentials = endpoint["authorization"]["credentials"]
            assert credentials["name"] == secret["metadata"]["name"]
            assert credentials["key"] in secret["data"]


def test_the_training_job_is_as_its_schema_says_and_its_pods_meet(copy: Path) -> None:
    objects = build(copy / "training")
    validate(objects)
    spec = named(objects, "Job", "train")["spec"]
    pod, labels = spec["template"]["spec"], spec["template"]["metadata"]["labels"]
    restricted(pod)
    (container,) = pod["containers"]
    options = dict(part.split("=") for part in container["command"] if "=" in part)
    assert int(options["--nnodes"]) == spec["completions"] == spec["parallelism"]
    service = named(objects, "Service", pod["subdomain"])
    assert options["--rdzv-endpoint"].startswith(f"train-0.{service['metadata']['name']}:")
    for selector in (service["spec"]["selector"], named(objects, "NetworkPolicy", "train")["spec"]["podSelector"]):
        assert selector.get("matchLabels", selector).items() <= labels.items()
    claims = {claim["metadata"]["name"] for claim in of_kind(objects, "PersistentVolumeClaim")} | {"models"}
    volumes = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "emptyDir" not in volume]
    assert {volume["claimName"] for volume in volumes} == claims
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for argument in container["args"]:
        if "=/" in argument:
            assert any(argument.partition("=")[2].startswith(mount) for mount in mounts), argument
    command, objective, *arguments = [part.replace("/training/data", str(copy)) for part in container["args"]]
    get_command(trainer).commands[command].commands[objective].make_context(objective, arguments)
