"""Lowering: a recipe as Megatron's command line, its launch policy and its seam report.

    lowering = lower(recipe("nam56r"), release="0.19.0")
    lowering.argv       # for Megatron-LM's own entry script
    lowering.policy     # what stays outside the command line
    lowering.seams      # what Megatron does not own

It fails closed: what has no owner is refused by name, nothing is dropped, and a flag that no
layer would read is not written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megacpp_nemo.contract.errors import LoweringError, lookup
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.features import Feature, placement
from megacpp_nemo.lowering.plan import Plan, PlannedLayer, make_plan
from megacpp_nemo.lowering.policy import LaunchOptions, LaunchPolicy, make_policy
from megacpp_nemo.lowering.refusals import (
    refuse_dead,
    refuse_other_launch,
    refuse_seams,
    refuse_unowned,
)
from megacpp_nemo.lowering.releases import DEFAULT_RELEASE, Release, load_release
from megacpp_nemo.lowering.seams import NEMO_ONLY, Seam
from megacpp_nemo.lowering.settings import Setting, flag_words, settings_of
from megacpp_nemo.lowering.spec_name import SPEC_MODULE
from megacpp_nemo.lowering.table import TABLE
from megacpp_nemo.lowering.values import spelled

SCHEMA = 1
SEAM_MODES = ("spec", "native-only")


@dataclass(frozen=True, kw_only=True)
class Open:
    """What a command still lacks before it can start.

    Args:
        what: What is missing, in words.
        settle: What settles it.
    """

    what: str
    settle: str


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """A recipe on a release of Megatron-LM.

    Args:
        name: The recipe's name.
        release: The release's name.
        argv: Arguments of `policy.entry_script`.
        policy: Launch policy.
        seams: Everything that Megatron does not own; empty for an all-native model.
        layers: The main pattern, layer by layer.
        prediction: One native multi-token prediction depth, layer by layer.
        features: Where each feature attaches, and whose it is.
        settings: Every setting, its owner and what carries it, once each.
        open: What the command lacks before it can start.
    """

    name: str
    release: str
    argv: tuple[str, ...]
    policy: LaunchPolicy
    seams: tuple[Seam, ...]
    layers: tuple[PlannedLayer, ...]
    prediction: tuple[PlannedLayer, ...]
    features: tuple[Feature, ...]
    settings: tuple[Setting, ...]
    open: tuple[Open, ...]

    @property
    def command(self) -> tuple[str, ...]:
        """The entry script's whole argument vector: `argv`, then the policy's flags."""
        return (*self.argv, *self.policy.arguments)

    def to_dict(self) -> dict[str, Any]:
        """Return the lowering as JSON's types; `schema` changes when a key changes meaning."""
        return {
            "schema": SCHEMA,
            "recipe": self.name,
            "release": self.release,
            "argv": list(self.argv),
            "policy": self.policy.to_dict(),
            "layers": [_layer(layer) for layer in self.layers],
            "prediction": [_layer(layer) for layer in self.prediction],
            "seams": [_plain(asdict(seam)) for seam in self.seams],
            "features": [_plain(asdict(feature)) for feature in self.features],
            "settings": [_plain(asdict(setting)) for setting in self.settings],
            "open": [asdict(item) for item in self.open],
        }


def lower(
    recipe: Any,
    *,
    release: str | Release = DEFAULT_RELEASE,
    seams: str = "spec",
    launch: LaunchOptions | None = None,
) -> Lowering:
    """Lower a recipe to a release of Megatron-LM.

    Args:
        recipe: A `HybridRecipe`, or a NeMo recipe of this package (a `nemo_run.Partial`) after
            any number of overrides.
        release: A release's name, or the path of a release file.
        seams: `spec` carries custom layers by Megatron's own `--spec`; `native-only` refuses
            while any seam is left.
        launch: What the user decides about the launch.

    Raises:
        LoweringError: Naming what has no owner, no place or no such value on the release.
        RecipeError: If a NeMo recipe's settings contradict each other.
    """
    lookup(
        {mode: mode for mode in SEAM_MODES},
        seams,
        what="Unknown way to treat seams",
        field="seams",
        error=LoweringError,
    )
    refuse_other_launch(launch)
    if not isinstance(recipe, HybridRecipe):
        from megacpp_nemo.lowering.configuration import read_nemo

        recipe, launch = read_nemo(recipe, launch)
    known = release if isinstance(release, Release) else load_release(release)
    plan = make_plan(recipe, known)
    refuse_unowned(plan)
    if seams == "native-only":
        refuse_seams(plan)
    argv, policy = tuple(_argv(plan)), make_policy(plan, launch)
    refuse_dead((*argv, *policy.arguments), known)
    return Lowering(
        name=recipe.name,
        release=known.name,
        argv=argv,
        policy=policy,
        seams=plan.seams,
        layers=plan.layers,
        prediction=plan.prediction,
        features=placement(plan),
        settings=settings_of(plan),
        open=tuple(_open(plan)),
    )


def spec_settings(plan: Plan) -> dict[str, Any]:
    """Return the fields that the name of the spec carries, by path."""
    return {
        row.field: row.value(plan.recipe)
        for row in TABLE
        if row.spec is not None and row.spec.holds(plan)
    }


def _argv(plan: Plan) -> Iterator[str]:
    # It may begin with the symbol of an MLP.
    yield from spelled(plan.release.pattern_flag, plan.pattern)
    stock = plan.release.stock_spec
    name = str(plan.spec_name(spec_settings(plan)))
    yield from ("--spec", *((SPEC_MODULE, name) if plan.seams else stock))
    first, last = plan.uneven_stages
    if first is not None and last is not None:
        yield from ("--decoder-first-pipeline-num-layers", str(first))
        yield from ("--decoder-last-pipeline-num-layers", str(last))
    for row in TABLE:
        for words in flag_words(plan, row):
            yield from words


def _open(plan: Plan) -> Iterator[Open]:
    for seam in plan.seams:
        if not seam.built:
            yield Open(
                what=f"{seam.what} works {NEMO_ONLY}: the spec refuses it",
                settle=seam.off
                + (f", or a release from {seam.native_since}" if seam.native_since else ""),
            )
    files = plan.recipe.files
    if plan.recipe.corpus == "sources":
        yield Open(
            what="Megatron reads indexed files, and this recipe tokenizes sources on the spot",
            settle="corpus=indexed files.data_path=PREFIX",
        )
    elif not files.data_path:
        yield Open(what="no data", settle="files.data_path=PREFIX")
    if not files.tokenizer_dir:
        yield Open(what="no tokenizer", settle="files.tokenizer_dir=FOLDER")


def _layer(layer: PlannedLayer) -> dict[str, Any]:
    return {
        "number": layer.number,
        "role": layer.role.name.lower(),
        "symbol": layer.symbol,
        "owner": layer.owner,
        "stage": layer.stage,
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return a dataclass's values with enumerations as text and tuples as lists."""
    return {
        key: list(value) if isinstance(value, tuple) else getattr(value, "value", value)
        for key, value in values.items()
    }
