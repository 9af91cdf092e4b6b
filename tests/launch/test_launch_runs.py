"""`megacpp launch`: what it would run, what it runs, and what it says where that fails.

Ranks of these runs are Megatron-LM's entry script made small; the last test trains.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megacpp_nemo.cli.given import words_of
from megacpp_nemo.contract import field_paths, recipe
from megacpp_nemo.launch.errors import RunFailed
from megacpp_nemo.launch.failures import first_failure
from tests.cli.conftest import Result, megacpp  # noqa: F401
from tests.support.training import small_recipe, write_sources

Command = Callable[..., Result]
NEMO = ("nam56r_tiny", "--profile", "cpux2", "--executor")
FULL = ("nam52", "--profile", "h200x16", "--executor")

# Each rank says where it is and fails or waits, as the name of a variable says.
ENTRY = """\
import os, pathlib, sys, time
rank, mark = os.environ["RANK"], pathlib.Path(__file__).with_name("mark")
print("rank", rank, "starts", flush=True)
for line in range(40):
    print("line", line, file=sys.stderr, flush=True)
if rank == "1":
    time.sleep(0.5)
    if os.environ.get("SIGNAL"):
        os.kill(os.getpid(), 9)
    print("rank 1 has had enough", file=sys.stderr, flush=True)
    mark.touch()
    os._exit(7)  # at once: the other rank ends as soon as it sees the mark
if os.environ.get("LATER"):
    while not mark.exists():
        time.sleep(0.01)
    raise RuntimeError("peer is gone")
time.sleep(60)
"""


@pytest.fixture(scope="module", autouse=True)
def _imported_once() -> None:
    import megacpp_nemo.recipes  # noqa: F401


@pytest.fixture
def dry(megacpp: Command) -> Callable[..., dict]:  # noqa: F811
    """Return `dry(*words) -> the launch as data`."""

    def run(*words: str) -> dict:
        result = megacpp("launch", *words, "--dryrun", "--format", "json")
        assert result.code == 0, result.err
        return json.loads(result.out)

    return run


def joined(command: str) -> str:
    return " ".join(command.replace("\\\n", " ").split())


def test_local_runs_one_process(dry):
    told = dry("nam56r_tiny", "--profile", "cpu", "--executor", "local")
    words = shlex.split(joined(told["command"]))
    assert words[:4] == ["python", "-m", "nemo_run.core.runners.fdl_runner", "-n"]
    assert told["environment"] == [
        {"name": "OMP_NUM_THREADS", "value": "1", "source": "profile cpu", "instead": ""}
    ]


def test_torchrun_has_the_profiles_processes(dry):
    told = dry(*NEMO, "torchrun")
    assert joined(told["command"]).startswith(
        "torchrun --rdzv-backend c10d --rdzv-endpoint localhost:0 --rdzv-id N "
        "--nnodes 1 --nproc-per-node 2 --node-rank 0 --tee 3 -m nemo_run.core.runners.fdl_runner"
    )


def test_docker_has_its_image_gpus_and_environment(dry):
    told = dry("nam52", "--profile", "h200x8", "--executor", "docker",
               "--set", "container_image=IMAGE", "--set", "volumes=/data:/data")  # fmt: skip
    command = joined(told["command"])
    assert command.startswith("docker run --rm --name nam52-ID-nam52 --network host")
    for fragment in ("--shm-size 32g", "--gpus 8", "--volume /data:/data",
                     "--env CUDA_DEVICE_MAX_CONNECTIONS=1",
                     "--workdir /nemo_run/code IMAGE torchrun", "--nproc-per-node 8"):  # fmt: skip
        assert fragment in command
    for variable in told["environment"]:
        assert f"--env {variable['name']}={variable['value']}" in command


SLURM = ("--set", "account=ME", "--set", "partition=gpu", "--set", "job_dir=/shared/jobs")


def test_slurm_has_its_flags_nodes_ranks_and_environment(dry):
    told = dry(*FULL, "slurm", *SLURM, "--set", "container_image=IMAGE", "--env", "NOTE=a b")
    lines = told["command"].splitlines()
    for flag in ("account=ME", "partition=gpu", "nodes=2", "ntasks-per-node=1", "gpus-per-node=8",
                 "time=04:00:00", "exclusive", "job-name=ME-ME.nam52"):  # fmt: skip
        assert f"#SBATCH --{flag}" in lines
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in lines
    assert "export NOTE='a b'" in lines
    srun = next(line for line in lines if line.startswith("srun --output"))
    assert re.search(r"--nnodes 2 --nproc-per-node 8 --node-rank \$SLURM_NODEID", srun)
    assert "--rdzv-endpoint $head_node_ip:29500" in srun
    assert "--container-image IMAGE" in srun
    assert "--label" in srun
    # Else variables of the image win over the launch's.
    named = re.search(r"--container-env (\S+)", srun)[1].split(",")
    assert named == [variable["name"] for variable in told["environment"]]


def test_slurm_runs_the_lowered_command_as_a_script(dry):
    told = dry(*FULL, "slurm", *SLURM, "ngram_hash=false", "--as", "megatron",
               "--release", "0.19.0", "--megatron-root", "/opt/Megatron-LM")  # fmt: skip
    script = told["scripts"]["nam52.sh"]
    assert "exec python /opt/Megatron-LM/pretrain_hybrid.py" in script
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in script
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in told["command"]  # stated once
    assert re.search(r"--nnodes 2 --nproc-per-node 8 .*--no-python .*nam52\.sh", told["command"])
    assert told["open"] == [
        "files.data_path=PREFIX (no data)", "files.tokenizer_dir=FOLDER (no tokenizer)"
    ]  # fmt: skip


def test_slurm_over_ssh_and_whole_nodes(dry, tmp_path):
    (tmp_path / "far.yaml").write_text(
        "about: far\nkind: slurm\noptions:\n  account: A\n  host: login\n  user: me\n"
        "  job_dir: /lustre/jobs\n  request_gpus: false\n  setup_lines: module load cuda\n"
    )
    told = dry(*FULL, str(tmp_path / "far.yaml"))
    assert "--output=/lustre/jobs/nam52/nam52_ID/nam52/sbatch_" in told["command"]
    assert "module load cuda" in told["command"]
    assert "gpus-per-node" not in told["command"]


def test_a_dry_run_is_told_in_words_and_leaves_nothing(megacpp, tmp_path):  # noqa: F811
    result = megacpp("launch", *NEMO, "torchrun", "data.num_workers=0", "--dryrun")
    assert (result.code, result.err) == (0, "")
    assert re.search(r"layout +1 x 2 processes = tensor 1, .*data 2", result.out)
    assert re.search(r"OMP_NUM_THREADS +1 +profile cpux2", result.out)
    assert "What would run\ntorchrun" in result.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "what", "hint"),
    [
        ("", 2, "launch needs a recipe", "megacpp launch nam56r_tiny"),
        ("nam56r_tiny", 2, "launch needs an executor", "megacpp launch nam56r_tiny --exec"),
        ("nam56r_tiny --executor torchrun --as megtron", 2, "launch knows no --as", "--as mega"),
        ("nam56r_tiny --executor torchrun --as megatron", 2, "launch --as megatron needs the root",
         "--megatron-root"),
        ("nam56r_tiny --executor torchrun --release 0.19.0", 2, "--release is for", "--as megatr"),
        ("nam56r_tiny --executor torchrn", 3, "No executor is called 'torchrn'", "torchrun"),
        ("nam56r --executor slurm --profile h200x9", 3, "No profile is called", "h200x8"),
        ("nam56r --executor slurm --profile h200x8", 3, "The executor slurm lacks account",
         "--set account=ACCOUNT"),
        ("nam56r --executor slurm --profile h200x8 num_nodes=2", 3, "The layout needs 16 GPUs",
         "a larger profile"),
        ("nam57r --executor local", 3, "No recipe is called", "nam56r"),
        ("nam56r_tiny --executor local trainer.max_stps=3", 3, "The recipe has no setting",
         "trainer.max_steps"),
        ("nam56r_tiny --executor torchrun --detach", 3, "The processes of the executor torchrun",
         "no --detach"),
        ("nam52 --executor docker --set container_image=I --dryrun --profile "
         "h200x8_pp2", 3, "The model asks for what is not built here", "virtual_pipeline"),
    ],
)  # fmt: skip
def test_a_wrong_launch_is_told_before_it_starts(megacpp, words, code, what, hint):  # noqa: F811
    result = megacpp("launch", *words.split())
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(f"megacpp: {what}")
    assert f"\n  try:     {hint}" in result.err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("nam56r_tiny --profile cpux2 --executor torchrun", "There is no torchrun"),
        ("nam52 --profile h200x8 --executor slurm --set account=ME", "There is no sbatch here"),
        ("nam52 --profile h200x8 --executor docker --set container_image=I", "Docker does not ans"),
    ],
)
def test_a_machine_without_the_program_is_told(megacpp, tmp_path, monkeypatch, words, what):  # noqa: F811
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    result = megacpp("launch", *words.split())
    assert result.code == 3
    assert result.err.startswith(f"megacpp: {what}")
    assert "\n  try:     " in result.err


def test_a_docker_that_does_not_answer_is_told(megacpp, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "docker").write_text("#!/bin/sh\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    words = "nam52 --profile h200x8 --executor docker --set container_image=I"
    result = megacpp("launch", *words.split())
    assert (result.code, "DockerException" in result.err) == (3, True)


def test_without_data_a_full_size_recipe_does_not_start(megacpp, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = "nam52 --profile h200x8 --executor slurm --set account=ME"
    result = megacpp("launch", *words.split())
    assert result.code == 3
    assert "try:     files.data_path=PREFIX files.tokenizer_dir=FOLDER" in result.err
    result = megacpp("launch", *words.split(), "data=corpus_folders")
    assert (result.code, "data.folders=DIR" in result.err) == (3, True)


SBATCH = """\
#!/bin/sh
for file; do :; done
cp "$file" "$(dirname "$0")/submitted.sh"
echo 12
"""


def test_slurm_submits_the_script_from_where_the_nodes_see_it(
    megacpp, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    programs = {"sbatch": SBATCH, "sacct": "#!/bin/sh\nprintf 'JobID|State\\n12|RUNNING\\n'\n"}
    for name in ("squeue", *programs):
        (tmp_path / name).write_text(programs.get(name, "#!/bin/sh\n"))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("sys.stdin", io.StringIO())  # pytest's cannot be read, and NeMo-Run does
    result = megacpp(
        "launch", *NEMO, "slurm", "--set", "account=ME", "--set", f"job_dir={tmp_path}/jobs",
        "--detach",
    )  # fmt: skip
    assert result.code == 0, result.err[-3000:]
    number = re.search(r"Submitted: nemo experiment status (nam56r_tiny_\d+)\n$", result.out)[1]
    folder = tmp_path / "jobs" / "experiments" / "nam56r_tiny" / number
    submitted = (tmp_path / "submitted.sh").read_text()
    assert f"srun --output {folder}/nam56r_tiny/log-ME-ME" in submitted
    config = re.search(r"-n nam56r_tiny (\S+)", submitted)[1]
    assert Path(config).is_file()


DATA = (
    "corpus=indexed", "data_path=/data/a", "tokenizer_dir=/data/t", "features.reset_state=false"
)  # fmt: skip


@pytest.mark.two_process
@pytest.mark.parametrize(
    ("variable", "code", "last", "how"),
    [
        # torchrun calls the lowest rank the root cause, of all that it finds ended at one look.
        ("LATER=1", 7, "rank 1 has had enough", "rank 1 ended first, with exit code 7"),
        ("SIGNAL=1", 137, "line 39", "rank 1 ended first, with signal 9 (SIGKILL)"),
    ],
)
def test_a_failing_rank_is_shown_and_its_code_is_the_commands(
    megacpp, megatron, variable, code, last, how  # noqa: F811
):  # fmt: skip
    root = megatron()
    (root / "pretrain_mamba.py").write_text(ENTRY)
    result = megacpp(
        "launch", "nam56r_tiny", "--executor", "torchrun", "--profile", "cpux2", "--as", "megatron",
        "--megatron-root", str(root), "--env", variable, *DATA
    )  # fmt: skip
    assert result.code == code, result.err[-3000:]
    shown, _, told = result.err.rpartition("megacpp: ")
    assert told.startswith(f"The run failed: {how}")
    lines = [line for line in shown.splitlines() if line.startswith("  ")][-30:]
    assert lines[-1] == f"  {last}"
    assert sum(bool(re.fullmatch(r"  line \d+", line)) for line in lines) >= 29
    assert re.search(r"given:   \S.*/1/stderr\.log\n", told)
    assert "try:     nemo experiment logs nam56r_tiny_" in told
    assert "rank 0 starts" in result.out  # the log of all ranks, while it ran


TORCHRUN = """\
1: [default3]:Traceback (most recent call last):
1: [default3]:ValueError: the first
0: [default2]:Traceback (most recent call last):
0: [default2]:RuntimeError: Connection closed by peer [10.0.0.1]:1
1: Root Cause (first observed failure):
1: [0]:
1:   time      : 2026-01-01_00:00:00
1:   host      : node1
1:   rank      : 11 (local_rank: 3)
1:   exitcode  : 5 (pid: 31)
0:   rank      : 2 (local_rank: 2)
0:   exitcode  : 1 (pid: 30)
"""


@pytest.mark.parametrize("swapped", [False, True])
def test_a_log_of_several_nodes_names_the_rank_that_lost_no_peer(tmp_path, swapped):
    lines = TORCHRUN.splitlines(keepends=True)
    text = "".join([*lines[2:4], *lines[:2], *lines[4:]]) if swapped else TORCHRUN
    (tmp_path / "log-ME.train_12_0.out").write_text(text)
    ended = first_failure(tmp_path)
    assert ended
    assert (ended.rank, ended.code) == (11, 5)
    assert ended.lines == ("Traceback (most recent call last):", "ValueError: the first")


def test_a_log_without_ranks_is_shown_from_its_end(tmp_path):
    (tmp_path / "log_train.out").write_text("\n".join(map(str, range(100))))
    ended = first_failure(tmp_path)
    assert ended
    assert (ended.rank, ended.lines[0], ended.lines[-1]) == (None, "70", "99")
    assert first_failure(tmp_path / "none") is None


def test_a_failed_run_survives_a_process_boundary():
    import pickle

    error = RunFailed("It failed", lines=("a",), exit_status=7, given="log", hint="look")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.lines, again.exit_status) == (str(error), ("a",), 7)


@pytest.mark.two_process
def test_two_processes_train_the_small_recipe(megacpp, tmp_path):  # noqa: F811
    sources = write_sources(tmp_path / "sources", files=12)
    small, base = field_paths(small_recipe()), field_paths(recipe("nam56r_tiny"))
    fields = {path: value for path, value in small.items() if value != base[path]}
    fields |= {"schedule.train_steps": 2, "cadence.eval_batches": 1, "cadence.save_interval": 2}
    result = megacpp(
        "launch", *NEMO, "torchrun", *words_of(fields), f"files.run_dir={tmp_path / 'run'}",
        f"data.root={sources}", f"data.cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    assert result.code == 0, result.err[-3000:]
    assert "data_parallel" in result.out or "Starting with 2 processes" in result.out
    weights = tmp_path / "run" / "checkpoints" / "step=2" / "weights"
    assert {path.name.split("_")[2] for path in weights.glob("__*.distcp")} == {"0", "1"}
    assert re.search(r"nemo experiment status nam56r_tiny_\d+\n$", result.out)
