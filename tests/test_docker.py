"""Container, compose and Kubernetes files: linted, valid, and agreeing with the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from nmexport.serving.bundle import FILENAME
from nmexport.serving.metrics import METRICS, QUEUE_TIME
from nmexport.serving.repository import LAUNCH

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
LAUNCH_TEMPLATE = ROOT / "nmexport" / "serving" / "templates" / f"{LAUNCH}.j2"
MANIFESTS = sorted(
    path for path in (DOCKER / "kubernetes").glob("*.yaml") if path.stem != "kustomization"
)


def document(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


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
    kubernetes_validate.validate(document(path), version, strict=True)


def test_a_kustomization_names_every_manifest() -> None:
    base = document(DOCKER / "kubernetes" / "kustomization.yaml")
    assert sorted(base["resources"]) == [path.name for path in MANIFESTS]
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
    assert image["newName"] == services["server-gpu"]["image"]
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
    stage = text[text.index("AS serve") :]
    assert f'CMD ["/bin/sh", "/package/{LAUNCH}"]' in stage
    assert "ENV BIND=0.0.0.0" in stage
    assert "${BIND:-" in LAUNCH_TEMPLATE.read_text("utf-8")


def test_the_openai_front_end_finds_the_model_by_itself(tmp_path: Path) -> None:
    text = (DOCKER / "serve.Dockerfile").read_text("utf-8")
    line = next(one for one in text.splitlines() if one.startswith("ENTRYPOINT"))
    shell, option, script, name = json.loads(line.removeprefix("ENTRYPOINT "))
    bundle = tmp_path / "package" / "model_repository" / "a model" / "1" / FILENAME
    bundle.parent.mkdir(parents=True)
    bundle.touch()
    (tmp_path / "package" / "model_repository" / "a model_engine" / "1").mkdir(parents=True)
    script = script.replace("/usr/bin/python3", "printf '%s\\n'").replace(
        "/package", f"{tmp_path}/package"
    )
    shown = subprocess.run(
        [shell, option, script.replace("exec ", ""), name, "--more"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert f"--tokenizer={bundle.parent}" in shown
    assert shown[-1] == "--more"
    assert "MODEL" not in (DOCKER / "compose.yaml").read_text("utf-8")


def test_what_is_scraped_and_scaled_on_exists() -> None:
    known = {spec.name for spec in METRICS}
    rule = document(DOCKER / "kubernetes" / "queue-time-rule.yaml")["data"]["config.yaml"]
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
