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
from nmexport.serving.metrics import METRICS, QUEUE_TIME

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
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


def test_a_server_installs_what_was_tested() -> None:
    locked = set((ROOT / "requirements.lock").read_text("utf-8").lower().split())
    wanted = [
        line
        for line in (DOCKER / "serve-requirements.txt").read_text("utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert {line.split("==")[0] for line in wanted} >= {"onnxruntime", "tokenizers", "jinja2"}
    assert set(wanted) <= locked


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


def test_requests_in_flight_end_before_a_server_is_killed() -> None:
    drain = re.search(
        r"--exit-timeout-secs=(\d+)", (DOCKER / "serve.Dockerfile").read_text("utf-8")
    )
    assert drain
    compose = document(DOCKER / "compose.yaml")["services"]["server"]
    assert int(compose["stop_grace_period"].rstrip("s")) > int(drain[1])
    pod = document(DOCKER / "kubernetes" / "deployment.yaml")["spec"]["template"]["spec"]
    pause = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > int(drain[1]) + pause


def test_nothing_is_published_to_the_network() -> None:
    for service in document(DOCKER / "compose.yaml")["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
