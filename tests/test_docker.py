"""Container, compose and Kubernetes files: linted, valid, and agreeing with the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from nmexport.serving.addresses import Addresses
from nmexport.serving.metrics import METRICS, QUEUE_TIME
from nmexport.serving.openai.opening import PACKAGES
from nmexport.serving.repository import LAUNCH

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
LAUNCH_TEMPLATE = ROOT / "nmexport" / "serving" / "templates" / f"{LAUNCH}.j2"
KUBERNETES = DOCKER / "kubernetes"
FOLDERS = [KUBERNETES, KUBERNETES / "fill", KUBERNETES / "metrics"]
MANIFESTS = sorted(
    path for folder in FOLDERS for path in folder.glob("*.yaml") if path.stem != "kustomization"
)


REGISTRY = "registry.example.com"
"""Stands for the user's own; RFC 2606 keeps anyone from having it."""


def document(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def manifests(kind: str) -> dict[tuple[str | None, str], Any]:
    """Manifests of a kind by namespace and name."""
    return {
        (one["metadata"].get("namespace"), one["metadata"]["name"]): one
        for path in MANIFESTS
        for one in documents(path)
        if one["kind"] == kind
    }


def pods() -> list[tuple[str | None, dict[str, str], Any]]:
    """Namespace, labels and specification of every pod that the manifests make."""
    single = [
        (where, pod["metadata"].get("labels", {}), pod["spec"])
        for (where, _), pod in manifests("Pod").items()
    ]
    templates = [
        (where, one["spec"]["template"]["metadata"]["labels"], one["spec"]["template"]["spec"])
        for (where, _), one in manifests("Deployment").items()
    ]
    return [*single, *templates]


def mount_of(spec: Any, volume: str) -> Any:
    return next(
        mount
        for container in spec["containers"]
        for mount in container["volumeMounts"]
        if mount["name"] == volume
    )


@pytest.mark.parametrize("name", ["build.Dockerfile", "serve.Dockerfile"])
def test_dockerfile_is_linted(name: str) -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
        "hadolint"
    )
    if program is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [program, str(DOCKER / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_compose_file_keeps_the_specification() -> None:
    pytest.importorskip("check_jsonschema", reason="the schema is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [*command, str(DOCKER / "compose.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("version", ["1.27", "1.33"])
def test_manifests_are_valid(path: Path, version: str) -> None:
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="the schemas are not installed"
    )
    for manifest in documents(path):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_kustomization_names_every_manifest() -> None:
    for folder in FOLDERS:
        named = document(folder / "kustomization.yaml")["resources"]
        assert sorted(named) == [path.name for path in MANIFESTS if path.parent == folder]
    gpu = document(DOCKER / "kubernetes" / "gpu" / "kustomization.yaml")
    (patch,) = yaml.safe_load(gpu["patches"][0]["patch"])
    at: Any = document(DOCKER / "kubernetes" / "deployment.yaml")
    for step in patch["path"].strip("/").split("/")[:-1]:
        at = at[int(step)] if step.isdigit() else at[step]
    assert "memory" in at  # the patch adds beside what is there


def requirements(device: str) -> dict[str, str]:
    """Versions by package, of both files that an image is made from."""
    texts = [
        (DOCKER / name).read_text("utf-8")
        for name in ("serve-requirements.txt", f"serve-{device}-requirements.txt")
    ]
    lines = [line for text in texts for line in text.splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_a_server_installs_what_was_tested() -> None:
    locked = set((ROOT / "requirements.lock").read_text("utf-8").lower().split())
    wanted = requirements("cpu")
    assert set(wanted) >= {"onnxruntime", "tokenizers", "jinja2"}
    assert {f"{name}=={version}" for name, version in wanted.items()} <= locked


def test_a_gpu_server_has_one_onnxruntime_and_else_the_same() -> None:
    cpu, gpu = requirements("cpu"), requirements("gpu")
    assert cpu.keys() - gpu.keys() == {"onnxruntime"}
    assert gpu.keys() - cpu.keys() == {"onnxruntime-gpu"}
    assert all(gpu[name] == cpu[name] for name in cpu.keys() & gpu.keys())
    ignored = (DOCKER / "serve.Dockerfile.dockerignore").read_text("utf-8")
    for name in ("serve-requirements", "serve-cpu-requirements", "serve-gpu-requirements"):
        assert f"!docker/{name}.txt" in ignored
    services = document(DOCKER / "compose.yaml")["services"]
    assert services["server-gpu"]["build"]["args"] == {"DEVICE": "gpu"}
    assert services["server-gpu"]["image"] != services["server"]["image"]
    (image,) = document(DOCKER / "kubernetes" / "gpu" / "kustomization.yaml")["images"]
    assert image["newName"] == f"{REGISTRY}/{services['server-gpu']['image']}"
    pod = document(DOCKER / "kubernetes" / "deployment.yaml")["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == f"{image['name']}:latest"


def test_engines_are_served_by_the_tensorrt_that_builds_them() -> None:
    releases = {
        name: re.search(
            r"^ARG \w+_VERSION=(\S+)$", (DOCKER / name).read_text("utf-8"), re.MULTILINE
        )
        for name in ("build.Dockerfile", "serve.Dockerfile")
    }
    assert all(releases.values())
    assert len({found[1] for found in releases.values() if found}) == 1


def test_a_container_runs_the_packages_own_launch_line() -> None:
    text = (DOCKER / "serve.Dockerfile").read_text("utf-8")
    assert f'CMD ["/bin/sh", "/package/{LAUNCH}"]' in text
    assert "ENV BIND=0.0.0.0" in text
    assert "${BIND:-" in LAUNCH_TEMPLATE.read_text("utf-8")


def test_openai_s_api_is_published_on_one_port_everywhere() -> None:
    port = Addresses().openai_port
    text = (DOCKER / "serve.Dockerfile").read_text("utf-8")
    exposed = re.search(r"^EXPOSE (.*)$", text, re.MULTILINE)
    assert exposed
    assert str(port) in exposed[1].split()
    assert f"OPENAI_PORT:-{port}" in LAUNCH_TEMPLATE.read_text("utf-8")
    assert f"127.0.0.1:{port}:{port}" in document(DOCKER / "compose.yaml")["x-server"]["ports"]
    (container,) = manifests("Deployment")[None, "nmexport-serve"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert {"name": "openai", "containerPort": port} in container["ports"]
    service = manifests("Service")[None, "nmexport-serve"]["spec"]["ports"]
    assert {"name": "openai", "port": port, "targetPort": "openai"} in service
    assert set(PACKAGES) <= set(requirements("cpu"))


def test_what_is_scraped_and_scaled_on_exists() -> None:
    known = {spec.name for spec in METRICS}
    rule = document(KUBERNETES / "metrics" / "queue-time-rule.yaml")["data"]["config.yaml"]
    used = set(re.findall(r"(nmexport_\w+?)_(?:sum|count)\b", rule))
    assert used == {QUEUE_TIME}
    assert used <= known
    made = re.search(r"as: (\S+)", rule)
    scaler = document(DOCKER / "kubernetes" / "autoscaler.yaml")
    assert made
    assert scaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == made[1]
    # Without requests the mean is nothing; the other arm has a value wherever there is a pod.
    query = yaml.safe_load(rule)["rules"][0]["metricsQuery"]
    mean, _, idle = query.partition(" or ")
    assert "> 0)" in mean
    assert re.fullmatch(rf"sum\(rate\({QUEUE_TIME}_count.*\) by \(<<\.GroupBy>>\) \* 0", idle)


def test_claims_are_filled_and_read() -> None:
    claims = manifests("PersistentVolumeClaim")
    uses = [
        (where, volume["persistentVolumeClaim"], mount_of(spec, volume["name"]))
        for where, _, spec in pods()
        for volume in spec["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert {(where, claim["claimName"]) for where, claim, _ in uses} == set(claims)
    writes = [not claim.get("readOnly") and not mount.get("readOnly") for _, claim, mount in uses]
    assert sorted(writes) == [False, True]  # the server, and what fills it
    assert {mount["mountPath"] for _, _, mount in uses} == {"/package"}
    (claim,) = claims.values()
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_images_of_ours_are_a_placeholder_that_the_text_explains() -> None:
    text = (KUBERNETES / "README.md").read_text("utf-8")
    ours = [
        container["image"]
        for where, _, spec in pods()
        for container in spec["containers"]
        if "nmexport" in container["image"]
    ]
    assert len(ours) == 2
    assert {image.rpartition("/")[0] for image in ours} == {REGISTRY}
    assert f"sed -i s#{REGISTRY}#" in text
    for folder in ("fill", "metrics", "gpu"):
        assert f"docker/kubernetes/{folder}" in text
    for path in re.findall(r"docker/kubernetes/?[\w./-]*", text):
        assert (ROOT / path).exists(), path


def test_every_configuration_is_mounted_where_its_program_reads_it() -> None:
    mounted = set()
    for where, _, spec in pods():
        for volume in spec["volumes"]:
            if "configMap" not in volume:
                continue
            name = volume["configMap"]["name"]
            folder = mount_of(spec, volume["name"])["mountPath"]
            (container,) = spec["containers"]
            (read,) = (
                word.partition("=")[2] for word in container["args"] if word.startswith("--config")
            )
            files = manifests("ConfigMap")[where, name]["data"]
            assert read in {f"{folder}/{file}" for file in files}
            mounted.add((where, name))
    assert mounted == set(manifests("ConfigMap"))


def test_services_and_apis_lead_to_pods() -> None:
    services = manifests("Service")
    for (where, _), service in services.items():
        (spec,) = (
            spec
            for place, labels, spec in pods()
            if place == where and service["spec"]["selector"].items() <= labels.items()
        )
        ports = {port["name"] for port in spec["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    (api,) = manifests("APIService").values()
    target = api["spec"]["service"]
    ports = services[target["namespace"], target["name"]]["spec"]["ports"]
    assert target["port"] in {port["port"] for port in ports}
    adapter = manifests("Deployment")["nmexport-metrics", "prometheus-adapter"]
    (url,) = (
        word.partition("=")[2]
        for word in adapter["spec"]["template"]["spec"]["containers"][0]["args"]
        if word.startswith("--prometheus-url")
    )
    match = re.fullmatch(r"http://(\w+)\.([\w-]+)\.svc:(\d+)/", url)
    assert match
    ports = services[match[2], match[1]]["spec"]["ports"]
    assert int(match[3]) in {port["port"] for port in ports}


def test_autoscaler_and_disruption_budget_are_about_the_server() -> None:
    server = manifests("Deployment")[None, "nmexport-serve"]
    (scaler,) = manifests("HorizontalPodAutoscaler").values()
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", server["metadata"]["name"])
    (budget,) = manifests("PodDisruptionBudget").values()
    assert budget["spec"]["selector"] == server["spec"]["selector"]


def test_prometheus_keeps_what_the_rule_asks_for() -> None:
    config = manifests("ConfigMap")["nmexport-metrics", "prometheus"]["data"]["prometheus.yaml"]
    (job,) = yaml.safe_load(config)["scrape_configs"]
    asked = {label for rule in job["relabel_configs"] for label in rule["source_labels"]}
    template = manifests("Deployment")[None, "nmexport-serve"]["spec"]["template"]
    for name in template["metadata"]["annotations"]:
        word = re.sub(r"\W", "_", name)
        assert f"__meta_kubernetes_pod_annotation_{word}" in asked
    made = {rule.get("target_label") for rule in job["relabel_configs"]}
    rule = document(KUBERNETES / "metrics" / "queue-time-rule.yaml")["data"]["config.yaml"]
    (entry,) = yaml.safe_load(rule)["rules"]
    assert set(entry["resources"]["overrides"]) <= made
    assert all(f'{label}!=""' in entry["seriesQuery"] for label in ("namespace", "pod"))
    (port,) = (
        port["name"]
        for port in template["spec"]["containers"][0]["ports"]
        if str(port["containerPort"]) == template["metadata"]["annotations"]["prometheus.io/port"]
    )
    assert port in {rule.get("regex") for rule in job["relabel_configs"]}


def test_accounts_and_roles_exist() -> None:
    accounts = set(manifests("ServiceAccount"))
    for where, _, spec in pods():
        if "serviceAccountName" in spec:
            assert (where, spec["serviceAccountName"]) in accounts
    roles = {name for _, name in manifests("ClusterRole")}
    known = {"system:auth-delegator", "extension-apiserver-authentication-reader"}
    theirs = {("kube-system", "horizontal-pod-autoscaler")}
    for kind in ("ClusterRoleBinding", "RoleBinding"):
        for binding in manifests(kind).values():
            assert binding["roleRef"]["name"] in roles | known
            for subject in binding["subjects"]:
                assert (subject["namespace"], subject["name"]) in accounts | theirs
    namespaces = {name for _, name in manifests("Namespace")}
    assert {where for where, _ in accounts} <= namespaces


def test_alerts_are_loaded_and_ask_for_metrics_that_exist() -> None:
    (name,) = document(DOCKER / "prometheus.yaml")["rule_files"]
    assert any(
        volume.startswith(f"./{name}:") for volume in prometheus()["volumes"] if "yaml" in volume
    )
    (group,) = document(DOCKER / name)["groups"]
    asked = set(re.findall(r"nmexport_\w+?(?=_sum|_count|\[)", str(group["rules"])))
    assert len(asked) == 3
    assert asked <= {spec.name for spec in METRICS}


def prometheus() -> Any:
    return document(DOCKER / "compose.yaml")["services"]["prometheus"]


def test_requests_in_flight_end_before_a_server_is_killed() -> None:
    drain = re.search(r"--exit-timeout-secs=(\d+)", LAUNCH_TEMPLATE.read_text("utf-8"))
    assert drain
    compose = document(DOCKER / "compose.yaml")["services"]["server"]
    assert int(compose["stop_grace_period"].rstrip("s")) > int(drain[1])
    pod = document(DOCKER / "kubernetes" / "deployment.yaml")["spec"]["template"]["spec"]
    pause = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > int(drain[1]) + pause


def test_nothing_is_published_to_the_network() -> None:
    for service in document(DOCKER / "compose.yaml")["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
