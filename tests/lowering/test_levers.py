"""Levers on Megatron's command line: carried by name, refused there, and never left out."""

from __future__ import annotations

from dataclasses import fields

import pytest

from megacpp_nemo.contract import LoweringError, RecipeError, field_paths, recipe
from megacpp_nemo.contract.plasticity import LEVERS, Plasticity
from megacpp_nemo.contract.recipe import resolve_field
from megacpp_nemo.lowering.audit import audit
from megacpp_nemo.lowering.lift import lift
from megacpp_nemo.lowering.lower import Lowering, lower
from megacpp_nemo.lowering.rows_plasticity import NAMES, PLASTICITY_ROWS, SCHEDULE, SWITCHES
from megacpp_nemo.lowering.seams import SEAMS, Kind
from megacpp_nemo.lowering.settings import Owner
from megacpp_nemo.lowering.spec_name import SPEC_MODULE, SpecName

NATIVE = {
    "latent_attention": False, "sparse_attention": False, "ngram_hash": False, "mtp.num_layers": 0
}  # fmt: skip
ON = {
    "fire": {"fire.steps": (100, 200), "fire.families": ("E", "m"), "fire.boundaries": ("data",)},
    "dash": {"dash.boundaries": ("context", "data"), "dash.target": "attention_qk"},
    "shrink": {"shrink.interval": 50, "shrink.layers": (2, 1)},
    "redo": {"redo.report_interval": 10, "redo.steps": (7,)},
    "stp": {"stp.weight": 0.02, "stp.layers": (1, 52)},
}


def lowered(*levers: str, release: str = "0.19.0") -> Lowering:
    changes = {key: value for lever in levers for key, value in ON[lever].items()}
    return lower(recipe("nam52", changes={**NATIVE, **changes}), release=release)


def spec_of(lowering: Lowering) -> SpecName:
    words = list(lowering.argv)
    module, name = words[words.index("--spec") + 1 :][:2]
    assert module == SPEC_MODULE
    return SpecName.parse(name)


def test_the_rows_are_the_levers_fields():
    assert tuple(NAMES) == tuple(SWITCHES) == tuple(item.name for item in fields(Plasticity))
    assert set(NAMES) == set(LEVERS)
    own = [path for path in field_paths() if path.startswith("plasticity.")]
    assert [row.field for row in PLASTICITY_ROWS] == own
    assert all(row.nemo == (f"{SCHEDULE}.{row.field}",) for row in PLASTICITY_ROWS)
    callbacks = {name for name, seam in SEAMS.items() if seam.kind is Kind.CALLBACK}
    assert callbacks == set(NAMES)


@pytest.mark.parametrize("lever", ON)
def test_a_lever_is_one_seam_and_the_spec_carries_all_of_it_and_nothing_else(lever):
    lowering = lowered(lever)
    (seam,) = lowering.seams
    assert (seam.id, seam.kind, seam.built) == (lever, Kind.CALLBACK, False)
    assert seam.nemo_owner == f"megacpp_nemo.callbacks.{lever}"
    name = spec_of(lowering)
    assert not any(layer.custom for layer in name.layers)
    made = recipe("nam52", changes={**NATIVE, **ON[lever]})
    own = {k: v for k, v in field_paths(made).items() if k.startswith(f"plasticity.{lever}.")}
    assert name.settings == own
    for setting in lowering.settings:
        if setting.field in own:
            assert setting.owner is Owner.SPEC
            assert setting.carried.startswith(f"{setting.field}=")
    (item,) = [item for item in lowering.open if item.settle == seam.off]
    assert item.what == f"{seam.what} works in a NeMo run only: the spec refuses it"


def test_a_lever_changes_the_spec_and_no_flag():
    bare, full = lowered(), lowered(*ON)
    assert [seam.id for seam in full.seams] == list(NAMES)
    assert [seam.layers for seam in full.seams][-1] == (1, 52)
    rest = [word for word in full.argv if not word.startswith(("layers=", SPEC_MODULE))]
    stock = [word for word in bare.argv if not word.endswith(("_spec", "_layer_specs"))]
    assert rest == stock
    assert bare.seams == ()


def test_what_is_off_is_megatrons_or_read_by_nobody():
    owners = {setting.field: setting.owner for setting in lowered("fire").settings}
    assert owners["plasticity.stp.weight"] is Owner.MEGATRON
    assert owners["plasticity.redo.steps"] is Owner.MEGATRON
    assert owners["plasticity.stp.spans"] is Owner.UNREAD
    assert owners["plasticity.fire.tolerance"] is Owner.SPEC


def test_native_only_refuses_a_lever_and_says_what_turns_it_off():
    made = recipe("nam52", changes={**NATIVE, **ON["shrink"]})
    with pytest.raises(LoweringError) as caught:
        lower(made, release="0.19.0", seams="native-only")
    assert SEAMS["shrink"].off in caught.value.hint
    with pytest.raises(LoweringError, match=r"Nobody owns these on Megatron 0\.15\.3: shrink"):
        lower(recipe("nam52", changes={**NATIVE, "pattern": "AM", **ON["shrink"]}),
              release="0.15.3")  # fmt: skip


def test_a_lever_is_lifted_and_stays_on_every_release():
    lowering = lowered(*ON)
    made = recipe(
        "nam52", changes={**NATIVE, **{k: v for on in ON.values() for k, v in on.items()}}
    )
    assert lift(lowering.argv, "0.19.0").plasticity == made.plasticity
    found = audit(made, "0.16.1", "0.19.0")
    assert set(found.remaining) == set(NAMES)
    assert found.graduated == ()


@pytest.mark.parametrize("families", [("D",), ("a", "M"), ("dblock", "E")])
def test_a_lever_that_tells_sparse_from_full_attention_is_told_by_layers(families):
    changes = {
        "pattern": "ADEM", "depth": 8, "a_ranks": (), "fire.steps": (1,), "fire.families": families,
        "fire.layers": (1, 2, 3, 4, 6),
    }  # fmt: skip
    with pytest.raises(LoweringError, match=r"fire\.families tells A from D") as caught:
        lower(recipe("nam56r", changes=changes))
    text = caught.value.hint
    changes |= {
        "fire.families": (),
        "fire.layers": tuple(map(int, text[text.rindex("[") + 1 : -1].split(","))),
    }
    lowering = lower(recipe("nam56r", changes=changes))
    assert lift(lowering.argv, "0.16.1").plasticity.fire.layers == changes["fire.layers"]
    wanted = {"D": (2, 6), "a": (1, 4), "dblock": (2, 3, 6)}[families[0]]
    assert changes["fire.layers"] == wanted


def test_a_lifted_lever_may_act_later_than_recipes_are_long():
    changes = {**NATIVE, "train_steps": 10**6, "fire.steps": (10**6,)}
    argv = lower(recipe("nam52", changes=changes)).argv
    assert lift(argv, "0.16.1").plasticity.fire.steps == (10**6,)


@pytest.mark.parametrize(
    ("short", "path"),
    [
        ("lr", "schedule.lr"),
        ("train_steps", "schedule.train_steps"),
        ("warmup_steps", "schedule.warmup_steps"),
        ("weight_decay", "schedule.weight_decay"),
        ("eval_interval", "cadence.eval_interval"),
        ("mtp.num_layers", "model.mtp.num_layers"),
        ("tolerance", "plasticity.fire.tolerance"),
        ("stp.weight", "plasticity.stp.weight"),
        ("weight", "plasticity.stp.weight"),
        ("redo.decay", "plasticity.redo.decay"),
        ("interval", "plasticity.shrink.interval"),
    ],
)
def test_short_names_mean_what_they_meant(short, path):
    assert resolve_field(short) == path


@pytest.mark.parametrize("name", ["layers", "steps", "target", "families", "floor", "threshold"])
def test_a_name_that_levers_share_is_refused_with_all_of_them(name):
    with pytest.raises(RecipeError, match="Several recipe fields") as caught:
        resolve_field(name)
    assert all(path.startswith("plasticity.") for path in str(caught.value.allowed).split(", "))
