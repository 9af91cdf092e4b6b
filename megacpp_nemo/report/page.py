"""A recipe as one HTML page: all of it in the file, and nothing that reaches for the network."""

from __future__ import annotations

from typing import Any, NamedTuple

from markupsafe import Markup

from megacpp_nemo import __version__
from megacpp_nemo.lowering.seams import NEMO_ONLY
from megacpp_nemo.report.colors import PAINTS, PLAIN
from megacpp_nemo.report.comparison import comparison
from megacpp_nemo.report.figures import about, figures
from megacpp_nemo.report.layers import layers
from megacpp_nemo.report.memory import memory
from megacpp_nemo.report.ownership import command, launches, seams
from megacpp_nemo.report.rendering import TEMPLATES, environment, policy
from megacpp_nemo.report.sizes import flops_table, parameters_table
from megacpp_nemo.report.subject import Subject
from megacpp_nemo.report.traffic import traffic


class Section(NamedTuple):
    """A section of the page: its anchor, its name, the template that draws its content."""

    id: str
    name: str
    template: str
    content: dict[str, Any]


def page(subject: Subject, against: Subject | None = None) -> str:
    """Return the page of a recipe.

    Args:
        subject: The recipe, on a release.
        against: What it is compared with; None for no comparison.

    Raises:
        PlanError: If FP8 is asked of a GPU without it.
        RecipeError: If no rule says what a part of the model costs.
    """
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8") + _paints())
    script = Markup((TEMPLATES / "page.js").read_text(encoding="utf-8"))
    return (
        environment()
        .get_template("page.html")
        .render(
            title=f"{subject.label} on Megatron-LM {subject.release}",
            label=subject.label,
            release=subject.release,
            about=about(subject),
            figures=figures(subject),
            sections=_sections(subject, against),
            policy=policy(style, script),
            style=style,
            script=script,
            version=__version__,
            unbuilt=NEMO_ONLY,
        )
    )


def _sections(subject: Subject, against: Subject | None) -> list[Section]:
    plan = subject.plan
    sizes = {"tables": [parameters_table(plan), flops_table(plan)]}
    found = [
        Section("layers", "Layers", "layers.html", layers(subject)),
        Section("sizes", "Parameters and operations", "plan.html", sizes),
        Section("memory", "Memory", "memory.html", memory(plan)),
        Section("traffic", "Pipeline and communication", "plan.html", traffic(plan)),
        Section("seams", "Seams", "seams.html", seams(subject)),
        Section("command", "Command", "command.html", command(subject)),
        Section("launch", "Launch policy", "launch.html", launches(subject)),
    ]
    if against is not None:
        content = comparison(subject, against)
        found.append(Section("comparison", "Comparison", "comparison.html", content))
    return found


def _paints() -> str:
    """Return the style of the families' cells, after their colours."""
    named = {family.letter: paint for family, paint in PAINTS.items()} | {"none": PLAIN}
    return "".join(
        f".f-{name} {{ background: {paint.fill}; color: {paint.ink}; }}\n"
        for name, paint in named.items()
    ) + "".join(
        f".p{place} {{ background: {paint.fill}; fill: {paint.fill}; }}\n"
        for place, paint in enumerate(PAINTS.values())
    )
