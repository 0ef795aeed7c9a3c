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
    "retries": 7,
    "grace_s": 300,
    "max_restarts": 9,
}
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
        (["spec", "pytorchReplicaSpecs", "Master", "template", "spec", "containers"], []),
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
    for pod in pods("PyTorchJob", **EVERYTHING):
        assert pod["containers"][0]["resources"]["limits"] == limits
    trainer = documents("TrainJob", **EVERYTHING)[1]["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"] == limits


def test_a_manifest_repeats_itself_rather_than_refer_to_other_lines() -> None:
    text = render(Kubernetes(**LEAST, nodes=2), [])  # type: ignore[arg-type]
    assert "&id" not in text
    assert "*id" not in text
