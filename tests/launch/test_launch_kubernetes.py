"""A launch on Kubernetes: the TrainJob it would be, the one it submits, and what it lacks."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from megacpp_nemo.launch.errors import LaunchError
from megacpp_nemo.launch.executors import read_executor, with_options
from megacpp_nemo.launch.failures import first_failure
from megacpp_nemo.launch.machine import check_machine
from megacpp_nemo.launch.places import find
from tests.cli.conftest import Result, megacpp  # noqa: F401
from tests.launch.kubernetes_cluster import Cluster

NEEDED = ("--set", "container_image=IMAGE", "--set", "workdir_pvc=jobs")
FULL = ("nam52", "--profile", "h200x16", "--executor", "kubernetes", *NEEDED)
SMALL = ("nam56r_tiny", "--profile", "cpux2", "--executor", "kubernetes", *NEEDED)
NODE = {"targetJobs": [{"name": "node"}]}


@pytest.fixture(scope="module", autouse=True)
def _imported_once() -> None:
    import megacpp_nemo.recipes  # noqa: F401


@pytest.fixture
def dry(megacpp: Callable[..., Result]) -> Callable[..., dict]:  # noqa: F811
    """Return `dry(*words) -> the launch as data, its manifest read`, without any cluster."""

    def run(*words: str) -> dict:
        result = megacpp("launch", *words, "--dryrun", "--format", "json")
        assert result.code == 0, result.err
        told = json.loads(result.out)
        return {**told, "manifest": yaml.safe_load(told["command"])}

    return run


def test_the_trainjob_has_its_image_pods_environment_and_volumes(dry):
    told = dry(*FULL, "--set", "volumes=data:/data,jobs:/out", "--env", "NOTE=a $(b) 'c'")
    job = told["manifest"]
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["metadata"] == {"name": "nam52-ID", "namespace": "default"}
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    trainer = job["spec"]["trainer"]
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("IMAGE", 2, 8)
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}
    # Kubernetes puts a variable's value for $(NAME), and writes $( for $$(.
    values = {item["name"]: item["value"].replace("$$(", "$(") for item in trainer["env"]}
    assert values == {item["name"]: item["value"] for item in told["environment"]}
    assert values["NOTE"] == "a $(b) 'c'"
    assert values["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    (pod,) = job["spec"]["podTemplateOverrides"]
    assert pod["spec"]["volumes"] == [
        {"name": "workdir", "persistentVolumeClaim": {"claimName": "jobs"}},
        {"name": "volume-1", "persistentVolumeClaim": {"claimName": "data"}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}},
    ]
    (container,) = pod["spec"]["containers"]
    assert container["name"] == "node"
    assert {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]} == {
        "/workspace": "workdir", "/data": "volume-1", "/out": "workdir", "/dev/shm": "shared-memory"
    }  # fmt: skip


def test_each_pod_runs_torchrun_by_what_the_trainer_tells_it(dry):
    told = dry(*FULL)
    code = "/workspace/USER/nam52_ID/nam52/code"
    assert told["manifest"]["spec"]["trainer"]["command"] == ["/bin/bash", f"{code}/launch.sh"]
    assert (
        "torchrun --rdzv-backend c10d --rdzv-endpoint $PET_MASTER_ADDR:29500 --rdzv-id N "
        "--nnodes 2 --nproc-per-node 8 --node-rank $PET_NODE_RANK --tee 3 "
        f"-m nemo_run.core.runners.fdl_runner -n nam52 {code}/configs/nam52_fn_or_script\n"
    ) in told["scripts"]["launch.sh"]


def test_the_lowered_command_is_a_script_with_its_own_environment(dry):
    told = dry(*FULL, "--as", "megatron", "--release", "0.19.0", "--megatron-root", "/opt/M")
    assert "--nproc-per-node 8" in told["scripts"]["launch.sh"]
    assert "--no-python /nemo_run/scripts/nam52.sh" in told["scripts"]["launch.sh"]
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in told["scripts"]["nam52.sh"]
    assert told["manifest"]["spec"]["trainer"]["env"] == []  # stated once


def test_a_file_says_where_the_pods_go(dry, tmp_path):
    (tmp_path / "ours.yaml").write_text(
        "about: ours\nkind: kubernetes\noptions:\n  container_image: I\n  workdir_pvc: jobs\n"
        "  workdir_pvc_path: /jobs\n  namespace: research\n  runtime_ref: torch-ours\n"
        "  labels: {kueue.x-k8s.io/queue-name: gpus}\n  node_selector: {gpu: h200}\n"
        "  tolerations: [nvidia.com/gpu, 'team=us:NoSchedule']\n  image_pull_secrets: [key]\n"
        "  pod_annotations: {note: 'a, b'}\n  memory_requests: 1.5Ti\n"
    )
    job = dry(*SMALL[:4], str(tmp_path / "ours.yaml"))["manifest"]
    assert job["metadata"]["namespace"] == "research"
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}
    assert job["spec"]["runtimeRef"] == {"name": "torch-ours"}
    assert job["spec"]["trainer"]["resourcesPerNode"] == {"requests": {"memory": "1.5Ti"}}
    (pod,) = job["spec"]["podTemplateOverrides"]
    assert pod["metadata"] == {"annotations": {"note": "a, b"}}
    assert pod["spec"]["nodeSelector"] == {"gpu": "h200"}
    assert pod["spec"]["imagePullSecrets"] == [{"name": "key"}]
    assert pod["spec"]["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists"},
        {"key": "team", "value": "us", "effect": "NoSchedule", "operator": "Equal"},
    ]
    assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["workdir"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    pytest.importorskip("kubernetes", reason="needs the package kubernetes")
    (tmp_path / "cluster").mkdir()
    made = Cluster(tmp_path / "cluster")
    # The package reads KUBECONFIG once, when it is imported.
    place = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    monkeypatch.setattr(place, str(made.kubeconfig))
    monkeypatch.setenv("PATH", f"{tmp_path}/cluster{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("sys.stdin", io.StringIO())  # pytest's cannot be read, and NeMo-Run does
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_what_is_submitted_is_what_was_shown(dry, megacpp, cluster):  # noqa: F811
    words = (*SMALL, "--set", "namespace=research", "--set", "volumes=data:/data")
    shown = dry(*words)
    result = megacpp("launch", *words)
    assert result.code == 0, result.err[-3000:]
    number = re.search(r"Done: nemo experiment status (nam56r_tiny_\d+)\n$", result.out)[1]
    (job,) = cluster.jobs
    drawn = job["metadata"]["name"]
    assert re.fullmatch(r"nam56r-tiny-[0-9a-f]{6}", drawn)
    text = json.dumps(job).replace(drawn, "nam56r-tiny-ID")
    text = re.sub(rf"/workspace/[^/]+/{number}/", "/workspace/USER/nam56r_tiny_ID/", text)
    assert json.loads(text) == shown["manifest"]
    # All that a pod is told to read lies on the volume.
    script = cluster.volume / job["spec"]["trainer"]["command"][1].lstrip("/")
    config = re.search(r"-n nam56r_tiny (\S+)", script.read_text())[1]
    assert (cluster.volume / config.lstrip("/")).is_file()


def test_a_job_that_fails_is_told(megacpp, cluster):  # noqa: F811
    cluster.ended = "failed"
    result = megacpp("launch", *SMALL, "--set", "namespace=research")
    assert result.code == 1
    assert "megacpp: The run failed with exit code 1" in result.err


PODS = """\
[pod/t-ab12cd-node-0-1-x7k2p/node] [default3]:Traceback (most recent call last):
[pod/t-ab12cd-node-0-1-x7k2p/node] [default3]:ValueError: the first
[pod/t-ab12cd-node-0-0-9mq4z/node] [default2]:Traceback (most recent call last):
[pod/t-ab12cd-node-0-0-9mq4z/node] [default2]:RuntimeError: Connection closed by peer
[pod/t-ab12cd-node-0-1-x7k2p/node]   rank      : 11 (local_rank: 3)
[pod/t-ab12cd-node-0-1-x7k2p/node]   exitcode  : 5 (pid: 31)
[pod/t-ab12cd-node-0-0-9mq4z/node]   rank      : 2 (local_rank: 2)
[pod/t-ab12cd-node-0-0-9mq4z/node]   exitcode  : 1 (pid: 30)
"""


def test_a_log_of_several_pods_names_the_rank_that_lost_no_peer(tmp_path):
    (tmp_path / "log-allranks_0.out").write_text(PODS)
    ended = first_failure(tmp_path)
    assert ended
    assert (ended.rank, ended.code) == (11, 5)
    assert ended.lines == ("Traceback (most recent call last):", "ValueError: the first")


def executor(*options: str):
    return with_options(read_executor(find("executors", "kubernetes")), options)


@pytest.mark.parametrize(
    ("package", "kubectl", "what", "hint"),
    [
        (False, True, "The package kubernetes is not installed",
         "pip install 'megacpp-nemo[kubernetes]'"),
        (True, False, "There is no kubectl here", "an installed kubectl"),
        (True, True, "Nothing says which Kubernetes cluster is meant", "KUBECONFIG=FILE"),
    ],
)  # fmt: skip
def test_what_a_submission_lacks_is_told(tmp_path, monkeypatch, package, kubectl, what, hint):
    chosen = executor()
    if package and kubectl:
        pytest.importorskip("kubernetes", reason="needs the package kubernetes")
        place = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
        monkeypatch.setattr(place, str(tmp_path / "none"))
    if kubectl:
        (tmp_path / "kubectl").write_text("#!/bin/sh\n")
        (tmp_path / "kubectl").chmod(0o755)
    if not package:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(LaunchError) as caught:
        check_machine(chosen)
    assert caught.value.what == what
    assert str(caught.value.hint).startswith(hint)


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ("workdir_pvc=My_Claim", "workdir_pvc takes a name of a-z, 0-9, - and ."),
        ("workdir_pvc_path=/nemo_run", "workdir_pvc_path takes an absolute path other than /nemo"),
        ("volumes=/data:/data", "volumes takes CLAIM:/FOLDER"),
        ("shm_size=32g", "shm_size takes a size such as 32Gi"),
        ("labels=team", "labels takes names and values"),
        ("labels=team=a b", "labels takes names and values"),
        ("tolerations=gpu:Never", "tolerations takes KEY, KEY=VALUE or KEY:EFFECT"),
    ],
)
def test_a_wrong_option_is_told(option, what):
    with pytest.raises(LaunchError) as caught:
        executor(option)
    assert caught.value.what.startswith(what)
    assert f"--set {option}" in str(caught.value.given)


def test_names_and_values_are_read_from_words():
    options = executor("labels=team=us,x.org/queue=gpus", "annotations=note=a=b").options
    assert options["labels"] == {"team": "us", "x.org/queue": "gpus"}
    assert options["annotations"] == {"note": "a=b"}
