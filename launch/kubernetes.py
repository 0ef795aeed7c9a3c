"""The job of a run under Kubernetes: a manifest for either of Kubeflow's operators.

With both, each pod runs `python -m launch nodes ...`, and the first pod serves the rendezvous. They
differ in which pods the operator replaces:

    exit code                       PyTorchJob                  TrainJob
    0                               done                        done
    1, 2: crashed, misused          failed for good             failed for good (podFailurePolicy)
    75: saved and ended early, or   replaced                    replaced, counts as one of `retries`
        a server or disk failed
    evicted, preempted, lost        replaced                    replaced, does not count

A PyTorchJob with `restartPolicy: ExitCode` replaces pods whose exit code is at least 128, and takes
1 to 127 for final. So there the agent ends with 143, SIGTERM's code, instead of 75. The operator
has no limit for such pods (kubeflow/training-operator issue 2045).
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from conf.exit_codes import ExitCode
from launch.config import TOLERATION, Kubernetes, passed_on

REPLACED = 143  # an exit code after which a PyTorchJob replaces the pod: 128 + SIGTERM
MARGIN_S = 30  # that a pod has for its end after the processes' `grace_s`
SHARED_MEMORY = {"name": "shared-memory", "mountPath": "/dev/shm"}


def render(config: Kubernetes, arguments: Sequence[str]) -> str:
    """The manifest for `kubectl apply -f -`; `arguments` are the training command's."""
    if config.kind == "PyTorchJob":
        documents = [_pytorch_job(config, arguments)]
    else:
        documents = [_training_runtime(config), _train_job(config, arguments)]
    return yaml.safe_dump_all(documents, sort_keys=False, width=1000)


def _pytorch_job(config: Kubernetes, arguments: Sequence[str]) -> dict[str, Any]:
    """The first pod is the `Master`, whose end is the end of the job; the others are `Worker`s."""
    command = _command(config, f"{config.name}-master-0", arguments, saved=REPLACED)
    container = {"command": command, "resources": _resources(config), "image": config.image}
    pod = _annotated(config, {"spec": _pod(config, "pytorch", container)})
    replica = {"replicas": 1, "restartPolicy": "ExitCode", "template": pod}
    replicas = {"Master": replica}
    if config.most_nodes > 1:
        replicas["Worker"] = replica | {"replicas": config.most_nodes - 1}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(config),
        "spec": {
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": _plain(replicas),
        },
    }


def _train_job(config: Kubernetes, arguments: Sequence[str]) -> dict[str, Any]:
    first = f"{config.name}-node-0-0.{config.name}"
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(config),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "TrainingRuntime",
                "name": config.name,
            },
            "trainer": {
                "image": config.image,
                "command": _command(config, first, arguments, saved=ExitCode.REQUEUE),
                "numNodes": config.most_nodes,
                "resourcesPerNode": _resources(config),
            },
        },
    }


def _training_runtime(config: Kubernetes) -> dict[str, Any]:
    """What a TrainJob cannot say about its pods: volumes, time to save, final exit codes."""
    rules: list[dict[str, Any]] = [
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": "node",
                "operator": "In",
                "values": [int(ExitCode.CRASHED), int(ExitCode.MISUSED)],
            },
        },
        {
            "action": "Ignore",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
    ]
    job = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {
                "backoffLimit": config.retries,
                "podFailurePolicy": {"rules": rules},
                "template": _annotated(
                    config,
                    {
                        "spec": _pod(config, "node", {"image": config.image})
                        | {"restartPolicy": "Never"}
                    },
                ),
            },
        },
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": _metadata(config),
        "spec": {
            "mlPolicy": {"numNodes": config.most_nodes},
            "template": {"spec": {"replicatedJobs": [job]}},
        },
    }


def _metadata(config: Kubernetes) -> dict[str, str]:
    return {"name": config.name} | ({"namespace": config.namespace} if config.namespace else {})


def _command(config: Kubernetes, host: str, arguments: Sequence[str], *, saved: int) -> list[str]:
    """The command of a pod: one agent, which ends with `saved` in place of code 75."""
    rendezvous = [f"address={host}:{config.port}", f"id={config.name}"]
    code = [] if saved == ExitCode.REQUEUE else [f"saved_code={saved}"]
    nodes = [config.python, "-m", "launch", "nodes"]
    words = [*nodes, *rendezvous, *code, *passed_on(config), *arguments]
    return [word.replace("$(", "$$(") for word in words]  # Kubernetes replaces $(NAME) otherwise


def _resources(config: Kubernetes) -> dict[str, Any]:
    amounts: dict[str, Any] = {"cpu": config.cpu, "memory": config.memory}
    if config.device:
        amounts[config.device] = config.processes
    if config.rdma:
        name, _, count = config.rdma.partition(":")
        amounts[name] = int(count or 1)
    amounts |= config.resources
    limits = {name: amount for name, amount in amounts.items() if amount is not None}
    return {"requests": dict(limits), "limits": limits}


def _pod(config: Kubernetes, container: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A pod with the run's volume, and shared memory, of which Docker gives only 64 MiB."""
    mounts = [{"name": "runs", "mountPath": config.mount}, SHARED_MEMORY]
    described: dict[str, Any] = {
        "name": container,
        "workingDir": config.mount,
        "volumeMounts": mounts,
        **settings,
    }
    if variables := _variables(config):
        described["env"] = variables
    if config.rdma:  # its devices read and write memory that must stay in place
        described["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    return {
        **_placement(config),
        "terminationGracePeriodSeconds": config.grace_s + MARGIN_S,
        "containers": [described],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": config.volume}},
            {
                "name": SHARED_MEMORY["name"],
                "emptyDir": {"medium": "Memory", "sizeLimit": config.shared_memory},
            },
        ],
    }


def _variables(config: Kubernetes) -> list[dict[str, Any]]:
    """The variables of a container: values, and references to Secrets."""
    found: list[dict[str, Any]] = [
        # Kubernetes replaces $(NAME) here, too.
        {"name": name, "value": value.replace("$(", "$$(")}
        for name, value in config.env.items()
    ]
    for name, reference in config.secrets.items():
        secret, _, key = reference.partition("/")
        source = {"secretKeyRef": {"name": secret, "key": key}}
        found.append({"name": name, "valueFrom": source})
    return found


def _placement(config: Kubernetes) -> dict[str, Any]:
    """On which machines a pod may run, and what it gets of them."""
    found: dict[str, Any] = {}
    if config.node_selector:
        found["nodeSelector"] = dict(config.node_selector)
    if config.tolerations:
        found["tolerations"] = [_toleration(text) for text in config.tolerations]
    if config.host_network:  # with the cluster's names of pods, by which they find each other
        found |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if config.image_pull_secret:
        found["imagePullSecrets"] = [{"name": config.image_pull_secret}]
    return found


def _toleration(text: str) -> dict[str, str]:
    """A taint that does not keep pods away.

    >>> _toleration("nvidia.com/gpu:NoSchedule")
    {'key': 'nvidia.com/gpu', 'operator': 'Exists', 'effect': 'NoSchedule'}
    >>> _toleration("team=lab")
    {'key': 'team', 'operator': 'Equal', 'value': 'lab'}
    """
    found = re.fullmatch(TOLERATION, text)
    assert found is not None
    key, value, effect = found.groups()
    operator = {"operator": "Exists"} if value is None else {"operator": "Equal", "value": value}
    return {"key": key, **operator} | ({"effect": effect} if effect else {})


def _annotated(config: Kubernetes, template: dict[str, Any]) -> dict[str, Any]:
    """The template of a pod with the annotations of the user's, such as a second network's name."""
    if not config.annotations:
        return template
    return {"metadata": {"annotations": dict(config.annotations)}, **template}


def _plain(value: Any) -> Any:
    """A copy in which no object occurs twice, for which YAML would write `&id001` and `*id001`."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
