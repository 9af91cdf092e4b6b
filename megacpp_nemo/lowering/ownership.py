"""Who owns a role on a release: Megatron by a symbol, this package on another's slot, or nobody."""

from __future__ import annotations

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.releases import RELEASE_NAMES, Release, load_release
from megacpp_nemo.lowering.roles import Role


def version_of(text: str) -> tuple[int, int]:
    """Return the major and minor version in text such as `0.16` or `0.16.1`."""
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


# The meaning, among a release's symbols, that builds each role.
MEANING = {
    Role.ATTENTION: "ATTENTION",
    Role.LATENT_ATTENTION: "MLA",
    Role.SPARSE_ATTENTION: "DS_ATTENTION",
    Role.EXPERTS: "MOE",
    Role.MLP: "MLP",
    Role.MAMBA: "MAMBA",
    Role.GATED_DELTA_NET: "GDN",
}
# Slots that a custom role can ride on, best first: they are called with the same arguments.
SLOTS = {
    Role.LATENT_ATTENTION: ("MLA", "DS_ATTENTION", "ATTENTION"),
    Role.SPARSE_ATTENTION: ("DS_ATTENTION", "MLA", "ATTENTION"),
    Role.MAMBA: ("MAMBA",),
    Role.AUTHOR_MAMBA: ("MAMBA",),
    Role.RECURRENT: ("MAMBA",),
}
MEGATRONS_CONV_WIDTH, MEGATRONS_CHUNK_SIZE = 4, 128


def refuse_unowned(release: Release, roles: set[Role]) -> None:
    """Refuse roles that neither the release nor this package's spec owns there."""
    known = [role for role, meaning in MEANING.items() if meaning in release.symbols]
    without = [
        role
        for role in Role
        if role in roles and role not in known and (role not in SLOTS or not release.carries_spec)
    ]
    if without:
        spec = "" if release.carries_spec else ", and this package's spec does not support it"
        raise LoweringError(
            f"Megatron {release.name} has no layer for "
            + ", ".join(role.words for role in without)
            + spec,
            given=f"{', '.join(role.words for role in without)} on release {release.name}",
            allowed=", ".join(role.words for role in known),
            hint=_better_release(roles) + "a pattern and features without these layers",
        )


def refuse_prediction(recipe: HybridRecipe, release: Release, prediction: tuple[Role, ...]) -> None:
    """Refuse prediction depths that the release builds and cannot train."""
    depth = recipe.model.mtp.num_layers
    if release.bounded_mtp_experts and Role.EXPERTS in prediction[depth:]:
        raise LoweringError(
            f"Megatron {release.name} builds this prediction depth and cannot train it: its "
            f"router keeps metrics of expert layers among the first {depth} of its layers only",
            given=f"mtp.pattern={recipe.model.mtp.pattern}, mtp.num_layers={depth}",
            allowed=f"E among the first {depth} layers of a depth",
            hint="model.mtp.pattern='EA', or release='0.19.0'",
        )


def _better_release(roles: set[Role]) -> str:
    """Return the first known release that takes all of these roles, as the start of a hint."""
    for name in RELEASE_NAMES:
        release = load_release(name)
        owned = {role for role, meaning in MEANING.items() if meaning in release.symbols}
        if roles <= owned | (set(SLOTS) if release.carries_spec else set()):
            return f"release={name!r}, or "
    return ""


def seam_of(recipe: HybridRecipe, release: Release, role: Role) -> str | None:
    """Return the seam that a role needs, or None where the release owns it."""
    mamba = recipe.model.mamba
    if role is Role.RECURRENT:
        return "m2rnn"
    if role is Role.AUTHOR_MAMBA:
        return "author-mamba"
    if role is Role.MAMBA:
        if (mamba.conv_width, mamba.chunk_size) != (MEGATRONS_CONV_WIDTH, MEGATRONS_CHUNK_SIZE):
            return "mamba-kernel-shape"
        # Megatron's mixer runs fused or not at all.
        return None if recipe.features.mamba_path in ("auto", "fused") else "mamba-path"
    has_symbol = MEANING[role] in release.symbols
    if role is Role.SPARSE_ATTENTION:
        # Norms on the latents came with the symbol for MLA, a release after DSA's.
        norms = recipe.model.latent.layernorm and "MLA" not in release.symbols
        return None if has_symbol and not norms else "dsa"
    return None if has_symbol else "mla"


def slot_of(release: Release, role: Role, *, sparse: bool) -> str:
    """Return the symbol that a custom role rides on, in a model with or without DSA."""
    meanings = [meaning for meaning in SLOTS[role] if meaning in release.symbols]
    if role is Role.LATENT_ATTENTION and not sparse and "DS_ATTENTION" in meanings:
        # Without DSA no layer needs its symbol, with which * may not be mixed.
        meanings.remove("DS_ATTENTION")
    return release.symbols[meanings[0]]
