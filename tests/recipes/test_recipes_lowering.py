"""A NeMo recipe lowers as the recipe it was made of, overrides included, or is refused by path."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract import (
    RECIPE_NAMES,
    HybridRecipe,
    LoweringError,
    MegaCppError,
    field_paths,
    recipe,
)
from megacpp_nemo.contract.checks import Checked
from megacpp_nemo.contract.plasticity import Plasticity
from megacpp_nemo.lowering.accounting import (
    ACTIVATION,
    CORPUS_LEAVES,
    HOST_LEAVES,
    POLICY_LEAVES,
    places,
)
from megacpp_nemo.lowering.configuration import account, read_nemo
from megacpp_nemo.lowering.leaves import read_leaves
from megacpp_nemo.lowering.lower import Lowering, lower
from megacpp_nemo.lowering.policy import LaunchOptions
from megacpp_nemo.lowering.rows_plasticity import SCHEDULE
from megacpp_nemo.lowering.table import ROWS, carried
from tests.support.recipes import changed, recipes

PROFILE = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
RELEASE = "0.19.0"
# Objects of torch and NeMo, which a test of plain values leaves alone.
OBJECTS = {"precision", "model.experts.activation", "corpus", "name"}


def nemo(made: HybridRecipe) -> Any:
    from megacpp_nemo.recipes import to_nemo

    return to_nemo(made)


def told(lowering: Lowering) -> dict[str, Any]:
    """Return a lowering without its name, which NeMo keeps only as a folder, and what is unread."""
    whole = lowering.to_dict()
    whole["settings"] = [
        (setting["field"], setting["carried"])
        for setting in whole["settings"]
        if setting["carried"] and setting["field"] != "name"
    ]
    del whole["recipe"]
    return whole


def lowered(made: HybridRecipe) -> Lowering:
    try:
        return lower(made, release=RELEASE)
    except LoweringError:
        assume(False)
        raise


def owner_of(config: Any, path: str) -> tuple[Any, str]:
    """Return the configuration that holds a leaf, and the leaf's name in it.

    A schedule of levers, and a lever in it, are added where they are missing.
    """
    parent, _, name = path.rpartition(".")
    for part in parent.split(".") if parent else ():
        if part == "PlasticitySchedule":
            config = schedule_in(config)
        elif isinstance(getattr(Plasticity(), part, None), Checked):
            if part not in config.__arguments__:
                setattr(config, part, type(config)(type(getattr(Plasticity(), part))))
            config = getattr(config, part)
        else:
            config = getattr(config, part)
    return config, name


def schedule_in(callbacks: list[Any]) -> Any:
    import nemo_run as run

    from megacpp_nemo.callbacks.schedule import PlasticitySchedule

    found = [entry for entry in callbacks if entry.__fn_or_cls__ is PlasticitySchedule]
    if not found:
        found = [run.Config(PlasticitySchedule, plasticity=run.Config(Plasticity))]
        callbacks.extend(found)
    return found[0]


def set_at(config: Any, path: str, value: Any) -> None:
    owner, name = owner_of(config, path)
    setattr(owner, name, value)


def unset(config: Any, path: str) -> None:
    owner, name = owner_of(config, path)
    delattr(owner, name)


def refused(partial: Any, **options: Any) -> MegaCppError:
    with pytest.raises(MegaCppError) as caught:
        lower(partial, **options)
    assert None not in (caught.value.given, caught.value.allowed, caught.value.hint)
    return caught.value


@pytest.mark.parametrize("mode", ["nemo_native", "author_dp"])
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_lowers_as_what_it_was_made_of(name, mode):
    from megacpp_nemo.recipes import FACTORIES

    lowering = lower(FACTORIES[name](mode=mode))
    assert lowering.name == name
    assert told(lowering) == told(lower(recipe(name, mode=mode)))


@settings(PROFILE, max_examples=60)
@given(recipes())
def test_any_recipe_lowers_as_what_it_was_made_of(made):
    expected = told(lowered(made))
    assert told(lower(nemo(made), release=RELEASE)) == expected


@settings(PROFILE, max_examples=40)
@given(recipes())
def test_every_set_leaf_has_one_claimant(made):
    lowered(made)
    partial = nemo(made)
    claims = account(partial)
    assert set(claims) == set(read_leaves(partial).values)
    known = {*field_paths(), "fixed", "policy", "host", "default"}
    assert set(claims.values()) <= known
    last = len(partial.trainer.callbacks) - 1
    for row in ROWS:
        for place in row.nemo:
            path = place.replace(SCHEDULE, f"trainer.callbacks[{last}]")
            if path in claims and path not in HOST_LEAVES:
                assert claims[path] == row.field


@settings(PROFILE, max_examples=120)
@given(recipes(), st.sampled_from(sorted(set(field_paths()) - OBJECTS)))
def test_an_override_of_its_leaves_is_a_change_of_the_field(made, field):
    other = changed(made, field)
    assume(other is not None)
    partial, before, after = nemo(made), carried(made), carried(other)
    assume(lowered(made) and lowered(other))
    for path in before.keys() - after.keys():
        unset(partial, path)
    for path, value in after.items():
        if path not in before or before[path] != value:
            set_at(partial, path, value)
    assert told(lower(partial, release=RELEASE)) == told(lowered(other))


@settings(PROFILE, max_examples=60)
@given(recipes(), st.data())
def test_a_leaf_that_no_recipe_has_is_refused_with_its_path(made, data):
    lowered(made)
    partial = nemo(made)
    leaves, known = read_leaves(partial), places(made)
    path, node = data.draw(st.sampled_from(sorted(leaves.nodes.items(), key=lambda item: item[0])))
    assume(not path.startswith("trainer.callbacks"))
    names = [
        name
        for name, parameter in inspect.signature(node).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    name = data.draw(st.sampled_from(names))
    leaf = f"{path}.{name}".lstrip(".")
    of_fields = {place for row in ROWS for place in row.nemo}
    free = {
        *known,
        *of_fields,
        *POLICY_LEAVES,
        *HOST_LEAVES,
        *CORPUS_LEAVES,
        ACTIVATION,
        *leaves.nodes,
    }
    assume(leaf not in {*free, *leaves.values, "trainer.callbacks"})
    value = data.draw(st.sampled_from(("surprise", -7, 0.125, ["a", 1], {"b": None})))
    set_at(partial, leaf, value)
    assert leaf in str(refused(partial, release=RELEASE))


@settings(PROFILE, max_examples=40)
@given(recipes(), st.sampled_from([row for row in ROWS if len(row.nemo) > 1]), st.data())
def test_places_of_one_setting_that_disagree_are_refused_with_both(made, row, data):
    lowered(made)
    partial = nemo(made)
    own = [path for path in row.nemo if path not in HOST_LEAVES]
    assume(len(own) > 1)
    path = data.draw(st.sampled_from(own))
    set_at(partial, path, 7)
    error = refused(partial, release=RELEASE)
    assert row.field in error.what
    assert all(place in str(error.given) for place in own)


@settings(PROFILE, max_examples=60)
@given(recipes(), st.data())
def test_a_place_that_holds_an_object_of_the_wrong_type_is_refused_and_nothing_else_breaks(
    made, data
):
    lowered(made)
    partial = nemo(made)
    path = data.draw(st.sampled_from(sorted({*places(made), ACTIVATION, *POLICY_LEAVES})))
    wrong = (object(), {"a": 1}, [object()], b"bytes", 1j, {1, 2}, print)
    set_at(partial, path, data.draw(st.sampled_from(wrong)))
    refused(partial, release=RELEASE)


class TestWhatUsersDo:
    @pytest.fixture
    def full(self) -> Any:
        from megacpp_nemo.recipes import nam56r

        return nam56r()

    @pytest.mark.parametrize(
        ("paths", "listed"),
        [
            ("/data/a", ["/data/a"]),
            (Path("/data/a"), ["/data/a"]),
            (["/data/a", Path("/data/b")], ["/data/a", "/data/b"]),
            (["30", "/data/a", "70", "/data/b"], ["30", "/data/a", "70", "/data/b"]),
            ([0.3, "/data/a", 0.7, Path("/data/b")], ["0.3", "/data/a", "0.7", "/data/b"]),
        ],
    )
    def test_indexed_files_in_every_form(self, full, paths, listed):
        from megacpp_nemo.recipes import indexed_files, use_data

        use_data(full, indexed_files(paths=paths, tokenizer_dir=Path("/tok")))
        argv = list(lower(full).argv)
        start = argv.index("--data-path") + 1
        assert argv[start : start + len(listed) + 1] == [*listed, "--split"]
        assert argv[argv.index("--tokenizer-model") + 1] == "/tok"

    @pytest.mark.parametrize(
        ("paths", "said"),
        [
            ({"train": ["/a"], "validation": ["/b"]}, "Data paths by split"),
            ([None], "A data path is text"),
            (object(), "A data path is text"),
            (True, "A data path is text"),
            (" ", "Files.data_path cannot be"),
        ],
    )
    def test_data_paths_that_no_command_line_takes(self, full, paths, said):
        from megacpp_nemo.recipes import indexed_files, use_data

        use_data(full, indexed_files(paths=paths))
        assert said in refused(full).what

    def test_sources_are_open_and_not_refused(self, full):
        from megacpp_nemo.recipes import cpp_folder, cpp_headers, use_data

        for data in (cpp_folder(root="/src"), cpp_headers()):
            use_data(full, data)
            assert any("tokenizes sources" in item.what for item in lower(full).open)
        full.data.exclude = ["a/*"]
        assert account(full)["data.exclude"] == "corpus"

    def test_documents_permuted_for_filling_in_are_refused(self, full):
        full.data.fim_rate, full.data.fim_spm_rate = 0.0, 0.5
        assert account(full)["data.fim_rate"] == "default"
        full.data.fim_rate = 0.5
        assert "data.fim_rate has no place in a recipe" in refused(full).what

    def test_loading_and_caching_are_the_launch_policys(self, full):
        full.data.num_workers, full.data.cache_dir = 3, Path("/cache")
        claims = account(full)
        assert claims["data.num_workers"] == claims["data.cache_dir"] == "policy"
        made, options = read_nemo(full, LaunchOptions(data_workers=9, blackwell=True))
        assert options == LaunchOptions(data_workers=3, cache_dir="/cache", blackwell=True)
        assert lower(full).argv == lower(made).argv
        full.data.num_workers = "three"
        assert "data_workers" in refused(full).what

    def test_what_only_nemo_does_is_left_to_it(self, full):
        full.trainer.num_sanity_val_steps = 0
        full.data.num_train_samples = 5
        full.trainer.callbacks[0].refresh_rate = 7
        claims = account(full)
        for path in ("trainer.num_sanity_val_steps", "data.num_train_samples",
                     "trainer.callbacks[0].refresh_rate"):  # fmt: skip
            assert claims[path] == "host"
        for callbacks in ([], None):
            full.trainer.callbacks = callbacks
            assert account(full)["trainer.callbacks"] == "host"
        assert lower(full) == lower(nemo(recipe("nam56r")))

    @pytest.mark.parametrize(
        "path", ["model.config.distribute_saved_activations", "log.ckpt.keep",
                 "trainer.strategy.fsdp", "resume.restore_config", "log.wandb"]
    )  # fmt: skip
    def test_a_leaf_set_to_what_nemo_takes_anyway_is_as_good_as_unset(self, full, path):
        leaves = read_leaves(full)
        set_at(full, path, leaves.default(path))
        assert account(full)[path] == "default"
        assert lower(full) == lower(nemo(recipe("nam56r")))

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("model.config.distribute_saved_activations", True),
            ("model.config.recompute_num_layers", 4),
            ("log.ckpt.keep", 1),
            ("trainer.strategy.ckpt_async_save", True),
            ("trainer.accelerator", "gpu"),
            ("model.config.num_query_groups", 8),
            ("model.config.params_dtype", "torch.bfloat16"),
            ("trainer.plugins.fp8_recipe", "mxfp8"),
            ("log.explicit_log_dir", None),
            ("optim.config.optimizer", "sgd"),
        ],
    )
    def test_a_value_that_the_command_line_could_not_say_is_refused_with_its_path(
        self, full, path, value
    ):
        set_at(full, path, value)
        error = refused(full)
        assert path in error.what
        assert f"{path}={value!r}" in str(error.given)

    @pytest.mark.parametrize(
        ("path", "value", "said"),
        [
            ("model.config.hidden_size", "4096", "ModelShape.hidden_size cannot be '4096'"),
            ("model.config.moe_router_topk", 99, "more experts than there are"),
            ("model.config.hybrid_override_pattern", "AEMX", "Unknown block letter 'X'"),
            ("model.config.hybrid_override_pattern", None, "A pattern is text"),
            ("trainer.devices", "auto", "Parallelism.devices_per_node cannot be 'auto'"),
            ("trainer.val_check_interval", 0.5, "Cadence.eval_interval cannot be 0.5"),
            ("trainer.devices", 7, "must divide the number of processes"),
        ],
    )
    def test_a_value_that_makes_no_recipe_meets_the_recipes_rule(self, full, path, value, said):
        set_at(full, path, value)
        error = refused(full)
        assert said in error.what
        if "pattern" not in path and value != 7:
            assert f"{path}={value!r}" in str(error.given)

    def test_the_name_is_the_folders(self):
        from megacpp_nemo.recipes import nam52

        assert lower(nam52()).name == "nam52"
        elsewhere = lower(nam52(log_dir="/scratch/second try"))
        assert elsewhere.name == "second try"
        assert elsewhere.argv[elsewhere.argv.index("--save") + 1] == "/scratch/second try"

    def test_depth_0_and_none_both_turn_prediction_off(self, full):
        full.model.config.mtp_num_layers = 0
        off = lower(full)
        full.model.config.mtp_num_layers = None
        assert lower(full) == off
        assert "mtp" not in {seam.id for seam in off.seams}

    def test_an_unset_leaf_is_what_nemo_takes(self, full):
        del full.optim.lr_scheduler.warmup_steps
        assert lower(full) == lower(nemo(recipe("nam56r")))  # the schedule's own default
        del full.trainer.max_steps
        assert "train_steps cannot be -1" in refused(full).what


class TestOtherParts:
    @pytest.fixture
    def full(self) -> Any:
        from megacpp_nemo.recipes import nam56r

        return nam56r()

    def replace(self, full: Any, path: str) -> None:
        import nemo_run as run
        from lightning.pytorch.loggers import WandbLogger
        from nemo import lightning as nl
        from nemo.collections import llm

        others = {
            "data": run.Config(llm.MockDataModule),
            "optim.lr_scheduler": run.Config(nl.lr_scheduler.CosineAnnealingScheduler),
            "trainer.strategy": run.Config(nl.MegatronStrategy),
            "trainer.plugins": [full.trainer.plugins],
            "log.wandb": run.Config(WandbLogger, project="p"),
            "resume.restore_config": run.Config(nl.RestoreConfig, path="/x"),
            "resume": run.Config(nl.AutoResume),
            "model": full.model.config,
            "model.config.cp_comm_type": {"a": run.Config(dict)},
        }
        set_at(full, path, others[path])

    @pytest.mark.parametrize(
        "path",
        ["data", "optim.lr_scheduler", "trainer.strategy", "trainer.plugins", "log.wandb",
         "resume.restore_config", "resume", "model", "model.config.cp_comm_type"],
    )  # fmt: skip
    def test_a_part_that_is_no_recipes_is_refused_with_its_path(self, full, path):
        self.replace(full, path)
        error = refused(full)
        assert isinstance(error, LoweringError)
        assert error.what.startswith(path)
        assert "no counterpart" in error.what

    @pytest.mark.parametrize("part", ["data", "optim", "model", "log.tensorboard", "resume"])
    @pytest.mark.parametrize("value", [None, 3, "nam56r_data"])
    def test_a_part_that_is_missing_is_named(self, full, part, value):
        set_at(full, part, value)
        error = refused(full)
        assert f"missing: {part}" in error.what
        assert f"{part}={value!r}" in str(error.given)

    def test_a_precision_without_its_plugin_is_refused(self, full):
        full.trainer.plugins = None
        assert "trainer.plugins is missing" in refused(full).what

    @pytest.mark.parametrize("callback", ["config", "object"])
    def test_a_callback_more_is_refused_with_its_place(self, full, callback):
        import nemo_run as run
        from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback

        more = run.Config(GarbageCollectionCallback) if callback == "config" else object()
        full.trainer.callbacks.append(more)
        assert "trainer.callbacks[2]" in refused(full).what

    def test_fine_tuning_is_refused_as_such(self, full):
        import nemo_run as run
        from nemo.collections import llm

        task = run.Partial(llm.finetune, model=full.model, trainer=full.trainer, data=full.data)
        assert "Fine-tuning" in refused(task).what

    def test_what_is_no_recipe_at_all(self, full):
        import nemo_run as run

        import megacpp_nemo.recipes as known

        for other in ("nam56r", None, known.nam56r, run.Script("x.sh"), [full]):
            assert refused(other).what == "Only recipes can be lowered"
        for other in (full.model, run.Partial(print), run.Config(dict)):
            assert refused(other).what == "This is not a recipe's configuration"

    def test_experts_of_another_activation(self, full):
        import torch.nn.functional as F

        full.model.config.activation_func = F.silu
        assert "gated_linear_unit" in refused(full).what
        full.model.config.gated_linear_unit = True
        assert "--swiglu" in lower(full).argv
        full.model.config.activation_func = F.relu
        assert "activation has no counterpart" in refused(full).what

    def test_an_array_has_no_place_and_breaks_nothing(self, full):
        import numpy as np

        full.trainer.accelerator = np.zeros(3)
        assert "trainer.accelerator" in refused(full).what
        full.trainer.accelerator = "auto"
        full.model.config.hidden_size = np.int64(3584)
        assert "int64(3584)" in str(refused(full).given)
