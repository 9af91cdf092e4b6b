"""Levers as fields of a recipe, as callbacks beside it, and on NeMo's command line."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from megacpp_nemo.contract import LoweringError, MegaCppError, RecipeError, recipe
from megacpp_nemo.contract.plasticity import LEVERS, FireLever, Plasticity, StpLever
from megacpp_nemo.lowering.configuration import account, read_nemo
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.rows_plasticity import NAMES, SWITCHES

SETTINGS: dict[str, dict[str, Any]] = {
    "fire": {"steps": [100, 200], "families": ["E", "M"], "tolerance": 1e-3},
    "dash": {"boundaries": ["data"], "target": "experts"},
    "shrink": {"interval": 10, "layers": [2, 4], "rate": 0.1},
    "redo": {"report_interval": 10, "steps": [50]},
    "stp": {"weight": 0.02, "start_step": 100, "measure": True},
}

TURNED_ON = {
    "steps": (1,), "boundaries": ("data",), "interval": 1, "report_interval": 1, "weight": 0.1,
    "measure": True,
}  # fmt: skip


def tiny(**changes: Any) -> Any:
    from megacpp_nemo.recipes import nam56r_tiny

    return nam56r_tiny(**changes)


def made(name: str) -> Any:
    from megacpp_nemo.recipes import LEVER_FACTORIES

    return LEVER_FACTORIES[name](**SETTINGS[name])


def as_fields(*names: str) -> dict[str, Any]:
    return {f"plasticity__{n}__{field}": v for n in names for field, v in SETTINGS[n].items()}


def levers_in(task: Any) -> dict[str, dict[str, Any]]:
    """Return the levers of a NeMo recipe, and what each of them sets."""
    found: dict[str, dict[str, Any]] = {}
    for callback in task.trainer.callbacks:
        if callback.__fn_or_cls__.__name__ == "PlasticitySchedule":
            for name, lever in callback.plasticity.__arguments__.items():
                assert name not in found
                found[name] = dict(lever.__arguments__)
    return found


def refused(task: Any) -> MegaCppError:
    with pytest.raises(MegaCppError) as caught:
        lower(task)
    assert None not in (caught.value.given, caught.value.allowed, caught.value.hint)
    return caught.value


def test_every_lever_has_a_factory_a_name_and_switches():
    import megacpp_nemo.recipes as recipes

    assert set(recipes.LEVER_FACTORIES) == set(LEVERS) == set(NAMES) == set(SWITCHES)
    for name in LEVERS:
        assert name in recipes.__all__
        assert getattr(recipes, name) is recipes.LEVER_FACTORIES[name]
        kind = type(getattr(Plasticity(), name))
        fields = {item.name: item.default for item in dataclasses.fields(kind)}
        parameters = inspect.signature(getattr(recipes, name)).parameters
        assert {key: found.default for key, found in parameters.items()} == fields
        assert kind.__doc__.split("\n")[0] in recipes.LEVER_FACTORIES[name].__doc__
        assert {field for field in fields if field in TURNED_ON} == set(SWITCHES[name])
        for switch in SWITCHES[name]:
            assert kind(**{switch: TURNED_ON[switch]}).on


def test_a_recipe_with_no_lever_on_has_no_callback_of_levers():
    task = tiny(plasticity__fire__tolerance=0.5, plasticity__redo__layers=[2])
    assert [entry.__fn_or_cls__.__name__ for entry in task.trainer.callbacks] == [
        "RunProgress", "RunSummary"
    ]  # fmt: skip


def test_a_recipe_carries_what_its_levers_set_and_survives_serialization(build):
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    task = tiny(**as_fields(*SETTINGS))
    assert levers_in(task) == SETTINGS
    serializer = ZlibJSONSerializer()
    assert serializer.deserialize(serializer.serialize(task)) == task
    intent = recipe("nam56r_tiny", changes={k.replace("__", "."): v for k, v in
                                            as_fields(*SETTINGS).items()})  # fmt: skip
    assert build(task.trainer.callbacks)[-1].plasticity == intent.plasticity


@pytest.mark.parametrize("name", SETTINGS)
def test_a_callback_beside_a_recipe_is_as_good_as_a_field_of_it(name, build):
    beside, inside = tiny(), tiny(**as_fields(name))
    beside.trainer.callbacks.append(made(name))
    if name == "stp":  # the small recipe has another default
        assert levers_in(beside)["stp"] == SETTINGS["stp"]
    assert read_nemo(beside)[0].plasticity == (
        dataclasses.replace(Plasticity(), **{name: getattr(read_nemo(inside)[0].plasticity, name)})
    )
    assert build(beside.trainer.callbacks)[-1].plasticity.on == (name,)


def test_several_schedules_are_read_as_one_wherever_they_stand():
    together, apart = tiny(**as_fields(*SETTINGS)), tiny()
    apart.trainer.callbacks = [made("stp"), made("fire"), *apart.trainer.callbacks]
    apart.trainer.callbacks += [made("redo"), made("dash"), made("shrink")]
    assert lower(apart) == lower(together)
    claims = account(apart)
    assert claims["trainer.callbacks[1].plasticity.fire.steps"] == "plasticity.fire.steps"
    assert claims["trainer.callbacks[5].plasticity.dash.target"] == "plasticity.dash.target"


def test_a_schedule_may_stand_alone_and_hold_objects():
    import nemo_run as run

    from megacpp_nemo.callbacks.schedule import PlasticitySchedule

    lever = FireLever(steps=(5,), tolerance=0.1)
    whole = run.Config(PlasticitySchedule, plasticity=Plasticity(fire=lever))
    part = run.Config(PlasticitySchedule, plasticity=run.Config(Plasticity))
    part.plasticity.fire = lever
    later = run.Config(PlasticitySchedule, plasticity=run.Config(Plasticity))
    later.plasticity = Plasticity(fire=lever)
    for schedule in (whole, part, later):
        task = tiny()
        task.trainer.callbacks = schedule
        assert read_nemo(task)[0].plasticity == Plasticity(fire=lever)
        assert account(task)["trainer.callbacks.plasticity.fire.steps"] == "plasticity.fire.steps"
    task.trainer.callbacks = [whole, run.Config(PlasticitySchedule, plasticity=Plasticity())]
    assert read_nemo(task)[0].plasticity.on == ("fire",)
    assert set(account(task).values()) >= {"default", "plasticity.fire.tolerance"}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_lever_in_two_schedules_is_refused_by_name(name):
    task = tiny(**as_fields(name))
    task.trainer.callbacks.append(made(name))
    error = refused(task)
    assert isinstance(error, LoweringError)
    assert error.what == f"The lever {name} ({NAMES[name]}) is set in two schedules"
    assert "trainer.callbacks[2].plasticity" in str(error.given)
    assert error.hint == f"without trainer.callbacks[3].plasticity.{name}"


def test_what_a_lever_that_is_off_sets_is_refused_with_its_place():
    task = tiny(plasticity__fire__steps=[5], plasticity__fire__tolerance=0.5)
    task.trainer.callbacks[2].plasticity.fire.steps = []
    error = refused(task)
    assert "trainer.callbacks[2].plasticity.fire.tolerance is read by nothing" in error.what


def test_a_lever_after_the_end_is_refused_with_its_steps():
    task = tiny(plasticity__fire__steps=[100])
    task.trainer.max_steps = 50
    error = refused(task)
    assert "plasticity.fire.steps comes after the run's last step" in error.what
    assert error.given == "plasticity.fire.steps=[100], train_steps=50"


@pytest.mark.parametrize("value", [None, 3, "fire"])
def test_a_schedule_of_something_else_is_refused_with_its_place(value):
    task = tiny(plasticity__fire__steps=[5])
    task.trainer.callbacks[2].plasticity = value
    assert "trainer.callbacks[2].plasticity has no place" in refused(task).what


def test_a_lever_of_another_kind_is_refused_with_its_place():
    import nemo_run as run

    task = tiny(plasticity__fire__steps=[5])
    task.trainer.callbacks[2].plasticity.fire = run.Config(StpLever)
    assert refused(task).what.startswith("trainer.callbacks[2].plasticity.fire has no counterpart")


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("fire", {}, "fire would never act"),
        ("stp", {"weight": 0}, "stp would never act"),
        ("dash", {"stps": [5]}, "dash has no setting 'stps'"),
        ("redo", {"steps": 5}, "RedoLever.steps cannot be 5"),
        ("shrink", {"interval": 5, "target": "expert"}, "ShrinkLever.target cannot be 'expert'"),
    ],
)
def test_a_factory_refuses_what_its_lever_does(name, settings, said):
    from megacpp_nemo.recipes import LEVER_FACTORIES

    with pytest.raises(RecipeError) as caught:
        LEVER_FACTORIES[name](**settings)
    assert caught.value.what == said


FIRE = {"fire": {"steps": [100]}}


@pytest.mark.parametrize(
    ("factory", "overrides", "levers", "count"),
    [
        ("nam56r_tiny(plasticity__fire__steps=[100])", (), FIRE, 3),
        (
            "nam56r_tiny(plasticity__fire__steps=[100,200],plasticity__fire__families=['E','M'])",
            (),
            {"fire": {"steps": [100, 200], "families": ["E", "M"]}},
            3,
        ),
        (
            "nam56r_tiny(plasticity__stp__weight=0.02)",
            (),
            {"stp": {"weight": 0.02, "start_step": 24}},
            3,
        ),
        ("nam56r_tiny", ("trainer.callbacks=[fire(steps=[100])]",), FIRE, 1),
        ("nam56r_tiny", ("trainer.callbacks+=[fire(steps=[100])]",), FIRE, 3),
        (
            "nam56r_tiny",
            ("trainer.callbacks+=[fire(steps=[5, 10],layers=[1,2]), shrink(interval=10)]",),
            {"fire": {"steps": [5, 10], "layers": [1, 2]}, "shrink": {"interval": 10}},
            4,
        ),
        (
            "nam56r_tiny(plasticity__fire__steps=[5])",
            ("trainer.callbacks[2].plasticity.fire.steps=[100]",),
            FIRE,
            3,
        ),
        (
            "nam56r_tiny(plasticity__stp__weight=0.5)",
            (
                "trainer.callbacks[2].plasticity.stp.weight=0.02",
                "trainer.callbacks[2].plasticity.stp.measure=true",
            ),
            {"stp": {"weight": 0.02, "start_step": 24, "measure": True}},
            3,
        ),
        ("nam56r_tiny", ("trainer=nam56r_tiny_trainer(plasticity__fire__steps=[100])",), FIRE, 3),
    ],
)
def test_a_command_line_resolves_to_the_levers_it_names(nemo, factory, overrides, levers, count):
    task = nemo.resolved(factory, *overrides)
    assert levers_in(task) == levers
    assert len(task.trainer.callbacks) == count
    assert set(read_nemo(task)[0].plasticity.on) == set(levers)


@pytest.mark.parametrize(
    ("factory", "override", "said"),
    [
        ("nam56r_tiny", "trainer.callbacks+=fire(steps=[5])", "callbacks+=[fire(steps=[5])]"),
        ("nam56r_tiny", 'trainer.callbacks+="[fire(steps=[5])]"', "callbacks+=[fire(steps=[5])]\n"),
        ("nam56r_tiny", "trainer.callbacks+=[fier(steps=[5])]", "fire, dash, shrink, redo, stp"),
        ("nam56r_tiny", "trainer.callbacks+=[fire(stps=[5])]", "boundaries, tolerance"),
        ("nam56r_tiny", "trainer.callbacks=[fire(steps=5)]", "FireLever.steps cannot be 5"),
        ("nam56r_tiny", "trainer.callbacks=[fire]", "try:     fire(steps=[100])"),
        ("nam56r_tiny", "trainer.callbacks+=[fire(steps=[300])]", "after the run's last step"),
        ("nam56r_tiny", "trainer.callbacks+=[stp(weight=0.02)]", "start_step=24"),
        ("nam56r_tiny(plasticity__fire__steps=[100])", "trainer.max_steps=50", "train_steps=50"),
        (
            "nam56r_tiny(plasticity__fire__steps=[100])",
            "trainer.callbacks+=[fire(steps=[5])]",
            "is set in two schedules",
        ),
        (
            "nam56r_tiny(plasticity__fire__steps=[100])",
            "trainer.callbacks[2].plasticity.dash.steps=[5]",
            "The recipe leaves dash at its defaults",
        ),
        (
            "nam56r_tiny(plasticity__fire__families=['R'],plasticity__fire__steps=[5])",
            "model.config.hybrid_override_pattern=AEMM",
            "families that the pattern does not have",
        ),
    ],
)
def test_a_lever_that_would_not_act_is_refused_in_four_parts(nemo, factory, override, said):
    assert said in nemo.refused(factory, override)


def test_two_additions_of_which_nemo_run_would_drop_one_are_refused(nemo):
    added = ("trainer.callbacks+=[fire(steps=[5])]", "trainer.callbacks+=[redo(steps=[5])]")
    said = nemo.refused("nam56r_tiny", *added)
    assert "try:     trainer.callbacks+=[fire(steps=[5]),redo(steps=[5])]" in said
    said = nemo.refused("nam56r_tiny", "trainer.max_steps+=1", "trainer.max_steps+=2")
    assert "try:     trainer.max_steps+=2 alone" in said


def test_fine_tuning_carries_levers_too(monkeypatch):
    from megacpp_nemo.recipes import finetune

    monkeypatch.setattr(finetune, "_complete", lambda checkpoint: checkpoint)
    monkeypatch.setattr(finetune, "_check_same_model", lambda *_: None)
    intent = recipe("nam56r_tiny", changes={"fire.boundaries": ["data"]})
    task = finetune.to_finetune(intent, checkpoint="/c", tokenizer_dir="/t")
    assert levers_in(task) == {"fire": {"boundaries": ["data"]}}
