"""What NeMo-Run gets of this package, and the adapters that are in force."""

from __future__ import annotations

from importlib import metadata

from megacpp_nemo.doctor.findings import Finding, State
from megacpp_nemo.doctor.packages import version_of
from megacpp_nemo.doctor.steps import (
    NAMES,
    Steps,
    broken,
    finding_of,
    look,
    simple,
    unchecked,
    unreached,
)

GROUP, PLUGIN = "nemo_run.cli", "megacpp_nemo.plugin"


def plugin_findings(steps: Steps) -> list[Finding]:
    """Return whether the plugin and what it stands on load, and what the adapters do."""
    return [_plugin(steps), _pretrain(steps), _core(steps), *_others(steps), *_adapters(steps)]


def quick_plugin() -> Finding:
    """Return whether the entry point stands in the metadata; it is not loaded."""
    if all(point.value != PLUGIN for point in metadata.entry_points().select(group=GROUP)):
        return _unregistered()
    name = NAMES["plugin.entry_point"]
    return unchecked("plugin.entry_point", name, "registered, not loaded")


def _unregistered() -> Finding:
    says = "NeMo-Run does not know this package, and finds none of its recipes"
    fix = "pip install -e '.[triton]'"
    return finding_of("plugin.entry_point", State.BROKEN, "not registered", says, fix)


def _plugin(steps: Steps) -> Finding:
    """Return whether NeMo-Run gets our recipes, and why not."""
    key = "plugin.entry_point"
    loaded, own = steps.get("entry_points"), steps.get("plugin")
    if loaded is None:
        return unreached(key)
    if not loaded["ok"]:
        return broken(key, loaded, "NeMo-Run itself cannot be imported: no `nemo` command starts")
    point = next((p for p in loaded["points"] if p["value"] == PLUGIN), None)
    if point is None:
        return _unregistered()
    swallowed = "NeMo-Run swallows this, and then says `No matching factory found`"
    if point["error"]:
        return finding_of(key, State.BROKEN, point["error"], swallowed, look("megacpp_nemo.plugin"))
    if own is None:
        return unreached(key)
    if not own["ok"]:
        return broken(key, own, swallowed, "megacpp_nemo.recipes")
    return finding_of(key, State.OK, f"loads: {len(own['recipes'])} recipes")


def _pretrain(steps: Steps) -> Finding:
    says = "NeMo hides this until a recipe is run"
    return simple(steps, "pretrain", "plugin.pretrain", lambda _: "imports", says, "nemo")


def _core(steps: Steps) -> Finding:
    """Return whether `megatron.core` is the installed package, and not a tree on the path."""
    key, step = "plugin.megatron_core", steps.get("megatron")
    wanted = version_of("megatron-core")
    if step and step["ok"] and wanted is not None and step["version"] != wanted:
        found = f"{step['version']} from {step['path']}, where {wanted} is installed"
        says = "a Megatron-LM tree stands before the installed package on the path of imports"
        return finding_of(key, State.BROKEN, found, says, "unset PYTHONPATH")
    return simple(
        steps, "megatron", key, lambda e: e["version"], "every layer is built on it", "megatron"
    )


def _others(steps: Steps) -> list[Finding]:
    """Return the plugins of other packages that fail; `llm` is NeMo's own commands."""
    failed = [
        point
        for point in steps.get("entry_points", {}).get("points", ())
        if point["error"] and point["value"] != PLUGIN
    ]
    return [
        Finding(
            key=f"plugin.other.{point['name']}",
            name=f"entry point `{point['name']}` of NeMo-Run",
            state=State.BROKEN if point["name"] == "llm" else State.LIMITED,
            found=point["error"],
            says="`nemo llm` has no commands" if point["name"] == "llm" else "another package's",
            fix=look(point["value"]),
        )
        for point in failed
    ]


def _adapters(steps: Steps) -> list[Finding]:
    step = steps.get("adapters")
    if step is None or not step["ok"]:
        said = unreached("adapters.in_force")
        return [said if step is None else broken("adapters.in_force", step, "", "nemo")]
    force = set(step["in_force"])
    return [
        Finding(
            key=f"adapters.{adapter['name']}",
            name=adapter["name"],
            state=State.OK,
            found="in force" if adapter["name"] in force else "not needed here",
            says=adapter["reason"],
        )
        for adapter in step["adapters"]
    ]
