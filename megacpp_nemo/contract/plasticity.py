"""Levers on a run in progress: what is done to the weights, when, and to which of them.

- `FireLever`: matrices projected towards isometry, once, at a phase boundary (FIRE)
- `DashLever`: rows shrunk by how far they point from the new data's gradient (DASH)
- `ShrinkLever`: rows shrunk a little, again and again, where they agree with the gradient
- `RedoLever`: dormant units of the expert MLPs found and recycled (ReDo)
- `StpLever`: an auxiliary loss that straightens hidden states along a document (STP)

Each is off until it is told when. Steps are optimizer steps: an action at step N comes after the
Nth and before the next, and is in the checkpoint of step N.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megacpp_nemo.contract.checks import (
    Checked,
    Count,
    Decay,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Rule,
    Text,
    one_of,
)
from megacpp_nemo.contract.errors import RecipeError
from megacpp_nemo.contract.parameters import TARGETS, Selection

BOUNDARIES = ("data", "context")

Boundary = Annotated[str, one_of(*BOUNDARIES)]
Target = Annotated[str, one_of(*TARGETS)]
Fraction = Annotated[float, Rule("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Share = Annotated[float, Rule("a number above 0, up to 1", lambda x: 0 < x <= 1)]


@dataclass(frozen=True, kw_only=True)
class _Lever(Checked):
    """What every lever on weights says: which it acts on.

    Args:
        target: Which projections, by what they are for.
        families: Block families to act on, by letter or alias; empty for all.
        layers: 1-based layer numbers to act on; empty for all.
    """

    target: Target = "all"
    families: tuple[Text, ...] = ()
    layers: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.selection  # noqa: B018 - refuses a family that does not exist

    @property
    def selection(self) -> Selection:
        """The logical matrices that the lever acts on."""
        return Selection(target=self.target, families=self.families, layers=self.layers)


@dataclass(frozen=True, kw_only=True)
class _PhaseLever(_Lever):
    """A lever that acts at phase boundaries.

    Args:
        steps: Optimizer steps after which it acts.
        boundaries: `data`: a run starts from another run's checkpoint, or resumes on other data;
            `context`: it resumes with longer rows.
    """

    steps: tuple[Positive, ...] = ()
    boundaries: tuple[Boundary, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        ordered = tuple(sorted(set(self.steps)))
        if self.steps != ordered:
            raise RecipeError(
                "The steps at which a lever acts are distinct and ascending",
                given=f"steps={self.steps}",
                allowed="each step once, in order",
                hint=f"steps={ordered}",
            )

    @property
    def on(self) -> bool:
        """Whether it ever acts."""
        return bool(self.steps or self.boundaries)


@dataclass(frozen=True, kw_only=True)
class FireLever(_PhaseLever):
    """FIRE: Frobenius-isometry reinitialization (arXiv 2602.08040).

    Each matrix becomes its polar factor, scaled by sqrt(out / in); the optimizer's moments of
    what it touched, and only those, become zero.

    Args:
        tolerance: On DfI / min(out, in), the mean squared deviation from isometry.
        max_iterations: At most so many Newton-Schulz iterations; what was reached is journalled.
    """

    tolerance: PositiveFloat = 1e-6
    max_iterations: Positive = 40


@dataclass(frozen=True, kw_only=True)
class DashLever(_PhaseLever):
    """DASH: direction-aware shrinking, the rule of the paper (arXiv 2410.23495).

    Each row is multiplied by its cosine with the averaged negative gradient, at least `floor`.

    Args:
        batches: Global batches of gradients that are averaged before it acts; no step is taken.
        averaging: Weight of each new gradient in the average (the paper's alpha).
        floor: Least factor of a row (the paper's lambda).
    """

    batches: Positive = 16
    averaging: Share = 0.3
    floor: Fraction = 0.3


@dataclass(frozen=True, kw_only=True)
class ShrinkLever(_Lever):
    """Periodic shrink: a rule that circulates as DASH and is another one.

    Every `interval` steps each row is multiplied by `1 - rate * max(cos - threshold, 0)`, at
    least `floor`, with its cosine to that step's gradient.

    Args:
        interval: Steps between actions; 0 for never.
        rate: Strength.
        threshold: Cosine from which it acts.
        floor: Least factor of a row.
    """

    interval: Count = 0
    rate: PositiveFloat = 0.01
    threshold: Fraction = 0.05
    floor: Fraction = 0.5

    @property
    def on(self) -> bool:
        """Whether it ever acts."""
        return self.interval > 0


@dataclass(frozen=True, kw_only=True)
class RedoLever(Checked):
    """ReDo: recycling dormant neurons (arXiv 2302.12902), on the MLPs of expert layers.

    A unit's score is its mean activity over its MLP's mean; it is dormant at `threshold` or
    below. Recycling draws its incoming weights anew, sets its outgoing ones to zero, and the
    moments of both.

    Args:
        report_interval: Steps between dormancy reports; 0 for none.
        steps: Steps after which dormant units are recycled.
        threshold: Score up to which a unit is dormant (the paper's tau).
        decay: Share of the running mean that one step keeps.
        layers: 1-based layer numbers; empty for all expert layers, prediction depths' included.
    """

    report_interval: Count = 0
    steps: tuple[Positive, ...] = ()
    threshold: NonNegativeFloat = 0.025
    decay: Decay = 0.99
    layers: tuple[Positive, ...] = ()

    @property
    def on(self) -> bool:
        """Whether it ever acts or reports."""
        return bool(self.report_interval or self.steps)


@dataclass(frozen=True, kw_only=True)
class StpLever(Checked):
    """STP: semantic tube prediction (arXiv 2602.22617).

    Adds `weight * (1 - cos(h_t - h_r, h_r - h_s))` for random positions s < r < t of one
    document, averaged over rows, spans and layers, to the training loss.

    Args:
        weight: Weight of the loss (the paper's lambda; .02 typical); 0 for off.
        start_step: Steps before it begins.
        layers: 1-based numbers of the layers whose output is straightened; empty for the last.
        spans: Triples per row and layer.
        measure: Log the loss where it is not in force, too.
    """

    weight: NonNegativeFloat = 0.0
    start_step: Count = 10_000
    layers: tuple[Positive, ...] = ()
    spans: Positive = 4
    measure: bool = False

    @property
    def on(self) -> bool:
        """Whether it is ever computed."""
        return self.weight > 0 or self.measure


@dataclass(frozen=True, kw_only=True)
class Plasticity(Checked):
    """Every lever of a run; all of them are off by default."""

    fire: FireLever = field(default_factory=FireLever)
    dash: DashLever = field(default_factory=DashLever)
    shrink: ShrinkLever = field(default_factory=ShrinkLever)
    redo: RedoLever = field(default_factory=RedoLever)
    stp: StpLever = field(default_factory=StpLever)

    @property
    def on(self) -> tuple[str, ...]:
        """Names of the levers that are on, in the order in which they act."""
        named = {name: getattr(self, name) for name in LEVERS}
        return tuple(name for name, lever in named.items() if lever.on)


# In the order in which they act where several are due at once: statistics of the old weights are
# used before the weights change, and the largest change comes last.
LEVERS = ("stp", "shrink", "dash", "redo", "fire")
