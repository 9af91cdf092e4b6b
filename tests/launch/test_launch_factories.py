"""`run.executor=NAME` on NeMo's command line, by the executor that is about to run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.recipes.conftest import CommandLine


class Executors(CommandLine):
    """`nemo` in this process, keeping the executors it would run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        import nemo_run

        def dryrun_fn(task: Any, executor: Any = None, **_: Any) -> None:
            self.seen.append(executor)

        monkeypatch.setattr(nemo_run, "dryrun_fn", dryrun_fn)


@pytest.fixture(scope="module", autouse=True)
def _imported_once() -> None:
    import megacpp_nemo.plugin  # noqa: F401


@pytest.fixture
def nemo(monkeypatch: pytest.MonkeyPatch) -> Executors:
    return Executors(monkeypatch)


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        (
            ["run.executor=h200x8_slurm(account=ME,time=01:00:00)"],
            "SlurmExecutor",
            {"account": "ME", "time": "01:00:00", "nodes": 1, "ntasks_per_node": 8,
             "gpus_per_node": 8, "launcher": "torchrun", "exclusive": True},
        ),
        (
            ["run.executor=h200x16_slurm", "run.executor.account=ME", "run.executor.nodes=3"],
            "SlurmExecutor",
            {"account": "ME", "nodes": 3, "ntasks_per_node": 8, "srun_args": ["--label"]},
        ),
        (
            ["run.executor=cpux2_torchrun", "run.executor.ntasks_per_node=4"],
            "LocalExecutor",
            {"ntasks_per_node": 4, "launcher": "torchrun", "env_vars": {"OMP_NUM_THREADS": "1"}},
        ),
        (
            ["run.executor=h200x8_docker(container_image=IMAGE)"],
            "DockerExecutor",
            {"container_image": "IMAGE", "num_gpus": 8, "ntasks_per_node": 8, "shm_size": "32g"},
        ),
        (
            ["run.executor=h200x16_kubernetes(container_image=IMAGE)",
             "run.executor.workdir_pvc=jobs", "run.executor.namespace=us"],
            "KubernetesExecutor",
            {"image": "IMAGE", "workdir_pvc": "jobs", "namespace": "us", "num_nodes": 2,
             "gpus_per_node": 8, "nprocs_per_node": 8, "launcher": "torchrun", "env_vars": {}},
        ),
        (["run.executor=cpu_local"], "LocalExecutor", {"ntasks_per_node": 1, "launcher": None}),
    ],
)  # fmt: skip
def test_an_executor_is_resolved_with_its_arguments_and_overrides(nemo, words, kind, expected):
    executor = nemo.resolved("nam56r_tiny", *words)
    assert type(executor).__name__ == kind
    assert {name: getattr(executor, name) for name in expected} == expected


def test_the_environment_is_the_launch_policys(nemo):
    from megacpp_nemo.contract import recipe
    from megacpp_nemo.lowering.policy import LaunchOptions, environment

    native = environment(recipe("nam56r").parallelism, LaunchOptions())
    assert "CUDA_DEVICE_MAX_CONNECTIONS" in native
    executor = nemo.resolved("nam56r", "run.executor=h200x8_slurm(account=ME)")
    assert executor.env_vars == native
    author = nemo.resolved("nam56r", "run.executor=h200x8_author_slurm(account=ME)")
    assert author.env_vars == environment(
        recipe("nam56r", mode="author_dp").parallelism, LaunchOptions()
    )


def test_files_of_ones_own(nemo, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "about: ours\nkind: slurm\noptions: {account: OURS}\nenvironment: {HTTP_PROXY: 'a b'}\n"
    )
    word = f"run.executor=files(executor={tmp_path}/mine.yaml,profile=cpux2)"
    executor = nemo.resolved("nam56r_tiny", word)
    assert (executor.account, executor.ntasks_per_node, executor.gpus_per_node) == ("OURS", 2, None)
    # NeMo-Run writes values into a shell script as they are.
    assert executor.env_vars == {"HTTP_PROXY": "'a b'", "OMP_NUM_THREADS": "1"}


def refused(nemo, *words: str) -> str:
    result = nemo("pretrain", "--factory", "nam56r_tiny", *words, "--dryrun")
    assert result.exit_code == 1
    assert nemo.seen == []
    said = result.stderr or str(result.exception)
    assert [said.count(part) for part in ("given:   ", "allowed: ", "try:     ")] == [1, 1, 1]
    return said


@pytest.mark.parametrize(
    ("word", "what", "hint"),
    [
        ("h200x8_slrum", "No executor is called 'h200x8_slrum'", "run.executor=h200x8_slurm"),
        ("h200x8_slurm", "The executor h200x8_slurm lacks account", "run.executor.account=ACCOUNT"),
        (
            "h200x8_kubernetes(container_image=I)",
            "The executor h200x8_kubernetes(container_image=I) lacks workdir_pvc",
            "run.executor.workdir_pvc=WORKDIR_PVC",
        ),
        ("h200x8_slurm(account=ME,time=soon)", "time takes HH:MM:SS", "--set time="),
        (
            "h200x8_slurm(acount=ME)",
            "h200x8_slurm cannot be made with",
            "run.executor=h200x8_slurm",
        ),
        ("files(executor=torchrun,profile=h200x16)", "cannot start the processes", "an executor"),
        ("files(executor=torchrun)", "An executor from files needs both", "files(executor="),
    ],
)
def test_a_wrong_executor_is_told(nemo, word, what, hint):
    said = refused(nemo, f"run.executor={word}")
    assert what in said
    assert f"try:     {hint}" in said


def test_only_pairs_that_fit_are_offered():
    from megacpp_nemo.launch.factories import FACTORIES

    assert {"h200x8_slurm", "h200x16_slurm", "h200x8_docker", "cpu_local"} <= set(FACTORIES)
    assert not {"h200x16_docker", "h200x16_torchrun", "h200x8_local"} & set(FACTORIES)
