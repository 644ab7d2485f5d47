"""Kubernetes manifests: an indexed Job with a headless Service, or a PyTorchJob. Written as YAML without a library."""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from efftrain.launch.commands import environment, torchrun
from efftrain.launch.job import Job, KubernetesConfig

Plain: TypeAlias = "Mapping[str, Plain] | Sequence[Plain] | str | int | bool"

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_NO_TEXT = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def kubernetes_manifest(job: Job) -> str:
    """For ``kubectl``. That of a PyTorchJob holds a word of its own: another one each time."""
    config = job.kubernetes
    assert config is not None, "checked when the job was made"
    parts = [_pytorch_job(job, config)] if config.kind == "pytorchjob" else [_service(job), _indexed_job(job, config)]
    if config.namespace is not None:
        for part in parts:
            part["metadata"] = {**part["metadata"], "namespace": config.namespace}
    return "---\n".join(to_yaml(part) for part in parts)


def to_yaml(value: Plain) -> str:
    """Block style. A text that YAML could take for something else, or not read at all, is quoted and escaped."""
    return "\n".join(_lines(value)) + "\n"


def _service(job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name},
        "spec": {
            "clusterIP": "None",  # names of pods, no address of its own
            "publishNotReadyAddresses": True,  # pods look for each other before they are ready
            "selector": _labels(job),
            "ports": [{"name": "rendezvous", "port": job.network.port}],
        },
    }


def _indexed_job(job: Job, config: KubernetesConfig) -> dict[str, Any]:
    nodes = job.workers.nodes
    # Pod 0 of an indexed Job is called NAME-0, and the Service of its subdomain makes that a host name.
    endpoint = f"{job.name}-0.{job.name}:{job.network.port}"
    launch = {"valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name},
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": nodes * job.workers.max_restarts,
            "template": {
                "metadata": {"labels": _labels(job)},
                "spec": {
                    "subdomain": job.name,
                    "restartPolicy": "OnFailure" if job.workers.max_restarts else "Never",
                    **_pod(job, config, torchrun(job, endpoint, job.name), launch),
                },
            },
        },
    }


def _pytorch_job(job: Job, config: KubernetesConfig) -> dict[str, Any]:
    workers = job.workers
    own = f"{job.name}-worker-0:{job.network.port}"  # the operator makes a Service for each pod
    # Its pods carry the name of the job only, which one that is deleted and made again has as well.
    launch = {"value": f"{job.name}-{secrets.token_hex(6)}"}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job.name},
        "spec": {
            "elasticPolicy": {
                "rdzvBackend": "c10d",
                "minReplicas": workers.min_nodes or workers.nodes,
                "maxReplicas": workers.nodes,
                "maxRestarts": workers.max_restarts,
            },
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": workers.nodes,
                    "restartPolicy": "OnFailure" if workers.max_restarts else "Never",
                    "template": {"spec": _pod(job, config, torchrun(job, own, job.name), launch, name="pytorch")},
                }
            },
        },
    }


def _pod(
    job: Job, config: KubernetesConfig, words: list[str], launch: Mapping[str, Any], name: str = "train"
) -> dict[str, Any]:
    """The part of a pod's spec that both kinds share. ``launch`` gives what tells this launch from others."""
    limits: dict[str, Any] = {}
    if config.cpus_per_node is not None:
        limits["cpu"] = config.cpus_per_node
    if config.memory is not None:
        limits["memory"] = config.memory
    if config.gpus_per_node:
        limits["nvidia.com/gpu"] = config.gpus_per_node
    variables: list[dict[str, Any]] = [
        {"name": key, "value": _literal(value)} for key, value in environment(job).items()
    ]
    variables.append({"name": "EFFTRAIN_LAUNCH_ID", **launch})
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": config.shared_memory}}
    ]
    if config.volume_claim is not None:
        mounts.append({"name": "runs", "mountPath": config.mount})
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": config.volume_claim}})
    container: dict[str, Any] = {
        "name": name,
        "image": config.image,
        "command": [_literal(word) for word in words],
        **({"workingDir": config.working_dir} if config.working_dir is not None else {}),
        "env": variables,
        **({"envFrom": [{"secretRef": {"name": config.secret}}]} if config.secret is not None else {}),
        **({"resources": {"limits": limits}} if limits else {}),
        "volumeMounts": mounts,
    }
    return {"containers": [container], "volumes": volumes}


def _labels(job: Job) -> dict[str, str]:
    return {"efftrain/job": job.name}


def _literal(text: str) -> str:
    """Kubernetes puts variables in for ``$(NAME)``; two dollars are one that it leaves alone."""
    return text.replace("$", "$$")


def _lines(value: Plain) -> list[str]:
    if isinstance(value, Mapping):
        return [line for key, item in value.items() for line in _item(f"{_scalar(key)}:", item)] or ["{}"]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [line for item in value for line in _item("-", item)] or ["[]"]
    return [_scalar(value)]


def _item(start: str, value: Plain) -> list[str]:
    lines = _lines(value)
    if isinstance(value, (str, int)) or not value:
        return [f"{start} {lines[0]}"]
    if start == "-":
        return [f"- {lines[0]}", *(f"  {line}" for line in lines[1:])]
    return [start, *(f"  {line}" for line in lines)]


def _scalar(value: str | int) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if _WORD.fullmatch(value) and value.lower() not in _NO_TEXT:
        return value
    return '"' + "".join(map(_escaped, value)) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    if character in '"\\':
        return f"\\{character}"
    if 0x20 <= code < 0x7F:
        return character
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
