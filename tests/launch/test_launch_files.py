"""Files of executors and profiles: ours hold, and what is wrong with one has file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacpp_nemo.contract import recipe
from megacpp_nemo.launch.errors import LaunchError
from megacpp_nemo.launch.executors import missing, read_executor, with_options
from megacpp_nemo.launch.kinds import KINDS
from megacpp_nemo.launch.places import find, names, shipped
from megacpp_nemo.launch.plan import POLICY, plan_launch
from megacpp_nemo.launch.profiles import Profile, read_profile
from megacpp_nemo.lowering.policy import LaunchOptions, environment

ROOT = Path(__file__).parents[2]
PROFILES = ("cpu", "cpux2", "h200x16", "h200x8", "h200x8_author", "h200x8_fp8", "h200x8_pp2")
EXECUTORS = ("docker", "kubernetes", "local", "slurm", "torchrun")


def executor(name: str = "slurm", *options: str):
    return with_options(read_executor(find("executors", name)), options)


def profile(name: str = "h200x8") -> Profile:
    return read_profile(find("profiles", name))


def test_ours_are_the_files_of_the_repository():
    assert shipped() == ROOT / "configs"
    assert tuple(names("executors")) == EXECUTORS
    assert tuple(names("profiles")) == PROFILES


@pytest.mark.parametrize("name", PROFILES)
def test_each_profile_lays_its_recipes_over_its_hardware(name):
    chosen = profile(name)
    small = not chosen.gpu
    for family in ("nam52", "nam56r"):
        plan = plan_launch(
            f"{family}_tiny" if small else family, executor=executor(), profile=chosen
        )
        assert plan.layout.world_size == chosen.devices
        assert plan.layout.num_nodes == chosen.nodes
        assert plan.on_gpus is (not small)


def test_the_two_modes_are_those_of_the_recipes():
    for name, mode in (("h200x8", "nemo_native"), ("h200x8_author", "author_dp")):
        plan = plan_launch("nam56r", executor=executor(), profile=profile(name))
        assert plan.recipe == recipe("nam56r", mode=mode)


def test_no_file_states_a_variable_of_the_policy_again():
    policy = environment(recipe("nam56r").parallelism, LaunchOptions(cache_dir="/c"))
    stated = [profile(name).launch.environment for name in PROFILES]
    stated += [executor(name).environment for name in EXECUTORS]
    assert not {name for variables in stated for name in variables} & set(policy)


def test_each_variable_has_its_source_and_the_last_one_wins(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "about: ours\nkind: slurm\nenvironment:\n  NCCL_NVLS_ENABLE: 1\n  NCCL_DEBUG: WARN\n"
    )
    plan = plan_launch(
        "nam56r",
        executor=read_executor(tmp_path / "mine.yaml"),
        profile=profile(),
        environment={"NCCL_DEBUG": "INFO"},
    )
    found = {item.name: item[1:] for item in plan.variables}
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == ("1", POLICY, "")
    assert found["NCCL_NVLS_ENABLE"] == ("1", "executor mine", "0")
    assert found["NCCL_DEBUG"] == ("INFO", "--env", "WARN")
    # A script sets them itself, and so takes all that the policy does not already say.
    assert plan.options.environment == {"NCCL_NVLS_ENABLE": "1", "NCCL_DEBUG": "INFO"}


def test_without_gpus_none_of_their_variables_are_set():
    plan = plan_launch("nam56r_tiny", executor=executor("torchrun"), profile=profile("cpux2"))
    assert plan.environment == {"OMP_NUM_THREADS": "1"}


def test_a_folder_of_ones_own_wins_and_a_path_stands_for_a_name(tmp_path):
    (tmp_path / "profiles").mkdir()
    mine = tmp_path / "profiles" / "h200x8.yaml"
    mine.write_text("about: ours\nhardware: {nodes: 1, devices_per_node: 4, gpu: h200}\n")
    assert find("profiles", "h200x8", tmp_path) == mine
    assert find("executors", "slurm", tmp_path) == ROOT / "configs/executors/slurm.yaml"
    assert read_profile(find("profiles", str(mine))).devices == 4


HARDWARE = "hardware: {nodes: 1, devices_per_node: 8}\n"


@pytest.mark.parametrize(
    ("kind", "text", "line", "what", "hint"),
    [
        ("profile", f"about: x\n{HARDWARE}paralelism: {{}}\n", 3, "There is no key paralelism",
         "parallelism: ..."),
        ("profile", f"about: x\n{HARDWARE}parallelism:\n  tensor_parallel_size: 2\n", 4,
         "There is no key parallelism.tensor_parallel_size", "tensor_model_parallel_size: ..."),
        ("profile", f"about: x\n{HARDWARE}parallelism:\n  num_nodes: 2\n", 4,
         "There is no key parallelism.num_nodes", "line 4 left out"),
        ("profile", "about: x\nhardware:\n  nodes: one\n  devices_per_node: 8\n", 3,
         "hardware.nodes takes a whole number", "nodes: 8"),
        ("profile", "about: x\nhardware:\n  nodes: '1'\n  devices_per_node: 8\n", 3,
         "hardware.nodes takes a whole number", "nodes: 8"),
        ("profile", "about: x\nhardware:\n  nodes: 1\n  devices_per_node: 0\n", 4,
         "hardware.devices_per_node cannot be 0", "devices_per_node: 1"),
        ("profile", "about: x\nhardware:\n  nodes: 1\n", 2,
         "hardware.devices_per_node is missing", "devices_per_node: 8"),
        ("profile", "about: x\nhardware: 8\n", 2, "hardware takes keys with values", "hardware:"),
        ("profile", "about: x\nhardware:\n  nodes: 1\n  devices_per_node: 8\n  gpu: h20\n", 5,
         "No GPU is known as 'h20'", "gpu: h200"),
        ("profile", f"about: x\n{HARDWARE}precision: fp7\n", 3, "Unknown precision", "precision="),
        ("profile", f"about: x\n{HARDWARE}mode: author\n", 3, "Unknown parallelism", "mode="),
        ("profile", f"about: x\n{HARDWARE}launch:\n  blackwell: 1\n", 4,
         "launch.blackwell takes true or false", "blackwell: true"),
        ("profile", f"about: x\n{HARDWARE}launch:\n  environment:\n    A-B: 1\n", 4,
         "LaunchOptions.environment cannot be", "environment="),
        ("profile", f"about: x\n{HARDWARE}launch:\n  cuda_graphs: attn\n", 4,
         "launch.cuda_graphs takes a list of texts", "cuda_graphs: [one, two]"),
        ("profile", f"about: x\n{HARDWARE}about: y\n", 3, "The key about stands twice", "line 3"),
        ("profile", "about: x\n hardware: [", 2, "is not YAML", "line 2 as"),
        ("profile", "- a\n- b\n", None, "has keys with values", "about: ..."),
        ("executor", "about: x\nkind: slrum\n", 2, "There is no kind of executor", "kind: slurm"),
        ("executor", "about: x\nkind: slurm\noptions:\n  acount: ME\n", 4,
         "There is no key options.acount", "account: ..."),
        ("executor", "about: x\nkind: docker\noptions:\n  account: ME\n", 4,
         "An executor of kind docker has no option account", "line 4 left out"),
        ("executor", "about: x\nkind: slurm\noptions:\n  exclusive: maybe\n", 4,
         "options.exclusive takes true or false", "exclusive: true"),
        ("executor", "about: x\nkind: slurm\noptions:\n  time: soon\n", 4,
         "options.time cannot be 'soon'", "time: as in HH:MM:SS"),
        ("executor", "about: x\nkind: slurm\nenvironment:\n  http_proxy: x\n", 4,
         "NeMo-Run writes names of variables in capitals", "HTTP_PROXY: x"),
        ("executor", "about: x\nkind: torchrun\nenvironment:\n  A: [1]\n", 4,
         "environment.A takes text", "A: text"),
        ("executor", "about: x\nkind: kubernetes\noptions:\n  labels:\n    team: a b\n", 4,
         "options.labels cannot be 'team=a b'", "labels: as in"),
        ("executor", "about: x\nkind: kubernetes\noptions:\n  volumes: [data]\n", 4,
         "options.volumes cannot be 'data'", "volumes: as in CLAIM:/FOLDER"),
        ("executor", "kind: local\n", None, "about is missing", "about: text"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told_with_its_line_and_key(tmp_path, kind, text, line, what, hint):
    path = tmp_path / f"{kind}.yaml"
    path.write_text(text)
    with pytest.raises(LaunchError) as caught:
        (read_profile if kind == "profile" else read_executor)(path)
    error = caught.value
    assert what in error.what
    assert str(error.given).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert str(error.hint).startswith(hint)
    assert error.allowed


def test_text_is_taken_as_it_is_written(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("about: x\nkind: slurm\noptions: {time: 1:30:00}\nenvironment: {A: 010}\n")
    read = read_executor(path)
    assert (read.options["time"], read.environment["A"]) == ("1:30:00", "010")


@pytest.mark.parametrize("text", [b"\xff\xfe", b"a: \x00"])
def test_bytes_that_are_no_text_are_told(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(LaunchError, match="is not YAML"):
        read_executor(path)


@pytest.mark.parametrize(
    ("word", "what", "hint"),
    [
        ("slrum", "No executor is called 'slrum'", "slurm"),
        ("", "No executor is called ''", "a file of your own, ./mine.yaml"),
        ("./none.yaml", "cannot be read", "another path"),
    ],
)
def test_an_unknown_executor_is_told_with_the_nearest(word, what, hint):
    with pytest.raises(LaunchError) as caught:
        read_executor(find("executors", word))
    assert what in caught.value.what
    assert str(caught.value.hint).startswith(hint)


def test_a_folder_without_files_of_a_launch_is_told(tmp_path):
    with pytest.raises(LaunchError, match="no executors and no profiles"):
        find("profiles", "h200x8", tmp_path)


@pytest.mark.parametrize(
    ("name", "option", "what"),
    [
        ("slurm", "acount=ME", "has no option 'acount'"),
        ("slurm", "account", "An option of an executor is NAME=VALUE"),
        ("slurm", "account=", "account takes text"),
        ("slurm", "time=soon", "time takes HH:MM:SS"),
        ("slurm", "exclusive=maybe", "exclusive takes true or false"),
        ("slurm", "cpus_per_task=two", "cpus_per_task takes a whole number"),
        ("slurm", "job_dir=here", "job_dir takes an absolute path"),
        ("torchrun", "account=ME", "has no option 'account'"),
    ],
)
def test_a_wrong_option_is_told(name, option, what):
    with pytest.raises(LaunchError) as caught:
        executor(name, option)
    assert what in caught.value.what
    assert f"--set {option}" in str(caught.value.given)
    assert caught.value.hint


def test_an_option_is_read_as_its_form_says():
    words = ("account=ME", "exclusive=false", "cpus_per_task=8", "container_mounts=/a:/a,/b:/b")
    options = executor("slurm", *words).options
    assert options["exclusive"] is False
    assert options["cpus_per_task"] == 8
    assert options["container_mounts"] == ["/a:/a", "/b:/b"]
    with pytest.raises(LaunchError, match="given twice"):
        executor("slurm", "account=A", "account=B")


def test_every_missing_option_is_named():
    assert missing(executor()) == ["account"]
    assert missing(executor("slurm", "account=A", "host=h")) == ["user", "job_dir"]
    assert missing(executor("docker")) == ["container_image"]
    assert missing(executor("kubernetes")) == ["container_image", "workdir_pvc"]
    assert [name for name in KINDS if name not in EXECUTORS] == []


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("h200x8", {"num_nodes": 2}, "The layout needs 16 GPUs, and h200x8 has 8"),
        ("h200x8", {"devices_per_node": 4}, "The layout uses 4 of the 8 GPUs of h200x8"),
        ("h200x8", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 8},
         "The layout needs 16 GPUs, and h200x8 has 8"),
    ],
)  # fmt: skip
def test_a_layout_of_another_size_than_the_hardware_is_refused(name, changes, what):
    fields = {f"parallelism.{field}": value for field, value in changes.items()}
    with pytest.raises(LaunchError) as caught:
        plan_launch("nam56r", executor=executor(), profile=profile(name), changes=fields)
    assert caught.value.what == what
    assert all(f"{field}={value}" in str(caught.value.given) for field, value in changes.items())


@pytest.mark.parametrize(
    ("name", "over", "what", "hint"),
    [
        ("local", "h200x8", "The executor local starts 1 process,", "--executor torchrun"),
        ("docker", "h200x16", "The executor docker starts 1 node,", "--executor slurm"),
    ],
)
def test_more_processes_than_an_executor_starts_are_refused(name, over, what, hint):
    with pytest.raises(LaunchError) as caught:
        plan_launch("nam56r", executor=executor(name), profile=profile(over))
    assert caught.value.what.startswith(what)
    assert caught.value.hint == hint


def test_a_model_that_does_not_fit_is_refused_by_how_many_gib():
    from megacpp_nemo.planner.gpus import GIB, GPUS
    from megacpp_nemo.planner.memory import most_loaded

    big = {"batch.micro_batch_size": 64, "batch.global_batch_size": 512}
    with pytest.raises(LaunchError) as caught:
        plan_launch("nam56r_4096", executor=executor(), profile=profile("h200x8_author"),
                    changes=big)  # fmt: skip
    needed = most_loaded(recipe("nam56r_4096", mode="author_dp", changes=big)).total_bytes
    over = needed - GPUS["h200"].memory_bytes
    assert over > 0
    assert f"needs {over / GIB:.1f} GiB more than an H200 has" in caught.value.what
