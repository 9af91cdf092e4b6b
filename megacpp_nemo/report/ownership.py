"""The sections of the seams, the command and the launch: what a lowering says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megacpp_nemo.cli.errors import as_words
from megacpp_nemo.cli.lowering_report import covers, summary
from megacpp_nemo.cli.script import launch
from megacpp_nemo.contract.errors import MegaCppError
from megacpp_nemo.lowering.lower import Lowering
from megacpp_nemo.lowering.seams import NEMO_ONLY, Seam
from megacpp_nemo.report.picture import MARKS
from megacpp_nemo.report.subject import Subject
from megacpp_nemo.report.tables import Table


def seams(subject: Subject) -> dict[str, Any]:
    """Return what `templates/seams.html` draws."""
    lowering = subject.lowering
    if lowering is None:
        return {"refusal": subject.refusal}
    marked = zip(lowering.seams, MARKS, strict=False)
    return {
        "refusal": None,
        "summary": summary(lowering),
        "seams": [_seam(seam, mark, lowering) for seam, mark in marked],
        "features": _features(lowering),
    }


def command(subject: Subject) -> dict[str, Any]:
    """Return what `templates/command.html` draws: the command, exactly, or the refusal, whole."""
    lowering = subject.lowering
    if lowering is None:
        return {"refusal": told(subject.refusal)}
    return {"refusal": None, "open": lowering.open, "command": command_text(lowering)}


def command_text(lowering: Lowering) -> str:
    """Return the launch as it is pasted into a shell, without a line break at its end."""
    return "\n".join(launch(lowering))


def launches(subject: Subject) -> dict[str, Any]:
    """Return what `templates/launch.html` draws: the sizes and the environment of the launch."""
    lowering = subject.lowering
    if lowering is None:
        return {"tables": []}
    policy = lowering.policy
    sizes = Table(
        caption="Processes",
        head=("what", "value"),
        rows=(
            ("entry script of Megatron-LM", policy.entry_script),
            ("nodes", str(policy.num_nodes)),
            ("processes on each", str(policy.devices_per_node)),
        ),
        code=(1,),
    )
    rows = tuple((name, value) for name, value in policy.environment.items())
    environment = Table(caption="Environment", head=("variable", "value"), rows=rows, code=(1,))
    return {
        "about": "What stays outside the command line's flags. Nothing in this package reads these "
        "variables: CUDA, NCCL and Transformer Engine do. The command sets them.",
        "tables": [sizes, environment],
    }


def told(error: MegaCppError | None) -> str:
    """Return an error whole, in a shell's words."""
    if error is None:
        return ""
    lines = [as_words(error.what)]
    for name, part in (("given", error.given), ("allowed", error.allowed), ("try", error.hint)):
        if part is not None:
            lines.append(f"{name + ':':<8} {as_words(str(part))}")
    return "\n".join(lines)


def _seam(seam: Seam, mark: str, lowering: Lowering) -> dict[str, Any]:
    return {
        "mark": mark,
        "id": seam.id,
        "what": seam.what,
        "built": seam.built,
        "state": "built" if seam.built else NEMO_ONLY,
        "facts": list(_facts(seam, lowering)),
    }


def _facts(seam: Seam, lowering: Lowering) -> Iterator[tuple[str, str, bool]]:
    """Yield name, value, and whether the value is code."""
    where = covers(seam, lowering)
    yield "layers" if seam.layers else "where", where, False
    yield "why it is ours", seam.reason, False
    if seam.nemo_owner:
        yield "owner in a NeMo run", seam.nemo_owner, True
    yield "owner" if seam.built else "refused by", seam.owner, True
    native = f"from {seam.native_since}" if seam.native_since else "in no release"
    yield "Megatron's own", native, False
    yield "graduates with", seam.graduates, False
    yield "turned off by", seam.off, True


def _features(lowering: Lowering) -> Table:
    return Table(
        caption="Features, and whose they are",
        head=("feature", "whose", "seam", "place"),
        rows=[
            (feature.name, feature.status.value, feature.seam or "-", feature.place or "-")
            for feature in lowering.features
        ],
        words=(1, 2, 3),
    )
