"""Manifests are what Kubeflow's operators accept, and replace the pods that should be replaced."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from conf.exit_codes import ExitCode
from launch.config import Kubernetes
from launch.kubernetes import REPLACED, render

SCHEMAS = json.loads(Path(__file__).with_name("kubeflow_schemas.json").read_text())
LEAST = {"image": "phd:1", "volume": "runs"}
EVERYTHING = {
    "nodes": "2:4",
    "processes": 4,
    "name": "big",
    "namespace": "lab",
    "mount": "/data/runs",
    "cpu": "32",
    "memory": "256Gi",
    "shared_memory": "64Gi",
    "env": {"NCCL_DEBUG": "WARN", "NOTE": "it's $(HOME)"},
    "secrets": {"WANDB_API_KEY": "wandb/api-key", "HF_TOKEN": "hub.lab/token"},
    "node_selector": {"node.kubernetes.io/instance-type": "p5.48xlarge"},
    "tolerations": ("nvidia.com/gpu:NoSchedule", "team=lab:NoExecute", "spot"),
    "resources": {"ephemeral-storage": "100Gi", "example.com/fpga": "1"},
    "rdma": "vpc.amazonaws.com/efa:32",
    "host_network": True,
    "annotations": {"k8s.v1.cni.cncf.io/networks": "ib0,ib1"},
    "image_pull_secret": "registry",
    "retries": 7,
    "grace_s": 300,
    "max_restarts": 9,
}
POD = ["spec", "pytorchReplicaSpecs", "Master", "template", "spec"]
ARGUMENTS = ["model=phd_cswa", "run.name=a b", "optim.lr=${x}", "run.dir=$(HOME)/x"]


def documents(kind: str, **settings: Any) -> list[dict[str, Any]]:
    config = Kubernetes(kind=kind, **LEAST, **settings)  # type: ignore[arg-type]
    return list(yaml.safe_load_all(render(config, ARGUMENTS)))


def pods(kind: str, **settings: Any) -> list[dict[str, Any]]:
    """The pods' specifications in a manifest."""
    found = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            found.extend([value] if "containers" in value else [])
            value = list(value.values())
        for item in value if isinstance(value, list) else []:
            look(item)

    look(documents(kind, **settings))
    return found


def commands(kind: str, **settings: Any) -> list[list[str]]:
    if kind == "TrainJob":
        return [documents(kind, **settings)[1]["spec"]["trainer"]["command"]]
    return [pod["containers"][0]["command"] for pod in pods(kind, **settings)]


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["least", "everything"])
@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
def test_a_manifest_fits_the_operators_schema(kind: str, settings: dict[str, Any]) -> None:
    found = documents(kind, **settings)
    kinds = ["PyTorchJob"] if kind == "PyTorchJob" else ["TrainingRuntime", "TrainJob"]
    assert [document["kind"] for document in found] == kinds
    for document in found:
        schema = {**SCHEMAS[document["kind"]], "$defs": SCHEMAS["$defs"]}
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(document, schema)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "pytorchReplicaSpecs", "Master", "restartPolicy"], "Sometimes"),
        (["spec", "pytorchReplicaSpecs", "Leader"], {}),
        (["spec", "runPolicy", "backofLimit"], 3),
        ([*POD, "containers"], []),
        ([*POD, "nodeselector"], {"gpu": "h100"}),
        ([*POD, "nodeSelector"], {"gpu": "two words"}),
        ([*POD, "tolerations"], [{"key": "a", "effect": "Never"}]),
        ([*POD, "tolerations"], [{"key": "a", "operator": "Exists", "value": "b"}]),
        ([*POD, "containers", 0, "env"], [{"name": "A", "secretKeyRef": {"name": "b"}}]),
        ([*POD, "containers", 0, "env"], [{"name": "A", "value": "b", "valueFrom": {}}]),
        ([*POD, "containers", 0, "resources"], {"limits": {"rdma/hca": "many"}}),
        ([*POD, "containers", 0, "securityContext"], {"capabilities": ["IPC_LOCK"]}),
    ],
)
def test_the_schema_notices_what_an_operator_would_refuse(path: list[str], value: Any) -> None:
    [document] = documents("PyTorchJob")
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    schema = {**SCHEMAS["PyTorchJob"], "$defs": SCHEMAS["$defs"]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
def test_every_pod_runs_an_agent_with_all_that_was_said(kind: str) -> None:
    for command in commands(kind, **EVERYTHING):
        assert command[:4] == ["python", "-m", "launch", "nodes"]
        assert {"nodes=2:4", "processes=4", "max_restarts=9", "grace_s=300"} < set(command)
        assert command[-4:-1] == ARGUMENTS[:-1]
        assert command[-1] == "run.dir=$$(HOME)/x"  # else the cluster would fill it in


def test_pods_meet_at_the_first_by_the_name_that_the_operator_gives_it() -> None:
    for command in commands("PyTorchJob", name="a", nodes=3):
        assert "address=a-master-0:29500" in command
    for command in commands("TrainJob", name="a", nodes=3):
        assert "address=a-node-0-0.a:29500" in command


def test_there_are_as_many_pods_as_machines() -> None:
    for nodes, workers in ((1, None), (2, 1), ("2:4", 3)):
        [job] = documents("PyTorchJob", nodes=nodes)
        replicas = job["spec"]["pytorchReplicaSpecs"]
        assert replicas["Master"]["replicas"] == 1
        assert replicas.get("Worker", {}).get("replicas") == workers
    for nodes, count in ((1, 1), (2, 2), ("2:4", 4)):
        _, job = documents("TrainJob", nodes=nodes)
        assert job["spec"]["trainer"]["numNodes"] == count


def test_a_pytorch_job_replaces_a_pod_that_saved_and_none_that_failed() -> None:
    """Its `ExitCode` policy replaces pods that ended with 128 or more."""
    [job] = documents("PyTorchJob", nodes=2)
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        assert replica["restartPolicy"] == "ExitCode"
    assert all(f"saved_code={REPLACED}" in command for command in commands("PyTorchJob", nodes=2))
    assert REPLACED >= 128 > max(ExitCode.FINISHED, ExitCode.CRASHED, ExitCode.MISUSED)


def test_a_train_job_replaces_a_pod_that_saved_and_none_that_failed() -> None:
    runtime, _ = documents("TrainJob", retries=7)
    [job] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    policy = job["template"]["spec"]
    fatal, lost = policy["podFailurePolicy"]["rules"]
    assert (fatal["action"], fatal["onExitCodes"]["values"]) == (
        "FailJob",
        [ExitCode.CRASHED, ExitCode.MISUSED],
    )
    assert not {ExitCode.REQUEUE, ExitCode.INTERRUPTED} & set(fatal["onExitCodes"]["values"])
    assert (lost["action"], lost["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert policy["backoffLimit"] == 7
    assert policy["template"]["spec"]["restartPolicy"] == "Never"  # a failure policy needs it


@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
def test_a_pod_has_the_runs_memory_to_share_and_time_to_save(kind: str) -> None:
    for pod in pods(kind, **EVERYTHING):
        assert pod["terminationGracePeriodSeconds"] > 300
        [container] = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert container["workingDir"] == "/data/runs"
        assert volumes[mounts["/data/runs"]]["persistentVolumeClaim"] == {"claimName": "runs"}
        memory = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert memory == {"medium": "Memory", "sizeLimit": "64Gi"}


def test_each_process_gets_a_device() -> None:
    limits = {"cpu": "32", "memory": "256Gi", "nvidia.com/gpu": 4}
    limits |= {"vpc.amazonaws.com/efa": 32, "ephemeral-storage": "100Gi", "example.com/fpga": "1"}
    for pod in pods("PyTorchJob", **EVERYTHING):
        assert pod["containers"][0]["resources"]["limits"] == limits
    trainer = documents("TrainJob", **EVERYTHING)[1]["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"] == limits


def test_a_manifest_repeats_itself_rather_than_refer_to_other_lines() -> None:
    text = render(Kubernetes(**LEAST, nodes=2), [])  # type: ignore[arg-type]
    assert "&id" not in text
    assert "*id" not in text


@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
def test_every_pod_gets_the_variables_and_secrets_by_reference(kind: str) -> None:
    for pod in pods(kind, **EVERYTHING):
        [container] = pod["containers"]
        found = {variable.pop("name"): variable for variable in container["env"]}
        assert found == {
            "NCCL_DEBUG": {"value": "WARN"},
            "NOTE": {"value": "it's $$(HOME)"},  # else the cluster would fill it in
            "WANDB_API_KEY": {"valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api-key"}}},
            "HF_TOKEN": {"valueFrom": {"secretKeyRef": {"name": "hub.lab", "key": "token"}}},
        }
    assert all("env" not in pod["containers"][0] for pod in pods(kind))


@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
def test_pods_run_where_they_were_told_to(kind: str) -> None:
    for pod in pods(kind, **EVERYTHING):
        assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "p5.48xlarge"}
        assert pod["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "team", "operator": "Equal", "value": "lab", "effect": "NoExecute"},
            {"key": "spot", "operator": "Exists"},
        ]
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        # With the machine's own resolver, pods would not find the first of them by its name.
        assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    text = render(Kubernetes(kind=kind, **LEAST, **EVERYTHING), [])  # type: ignore[arg-type]
    assert text.count("k8s.v1.cni.cncf.io/networks: ib0,ib1") == len(pods(kind, **EVERYTHING))


@pytest.mark.parametrize(("rdma", "count"), [("rdma/hca_shared", 1), ("rdma/ib:8", 8)])
def test_a_pod_with_rdma_may_lock_memory(rdma: str, count: int) -> None:
    for pod in pods("PyTorchJob", rdma=rdma):
        [container] = pod["containers"]
        assert container["resources"]["limits"][rdma.partition(":")[0]] == count
        assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    for pod in pods("PyTorchJob"):
        assert "securityContext" not in pod["containers"][0]
