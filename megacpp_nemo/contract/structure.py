"""The code-structure channels: what each token is told of the syntax tree it lies in."""

from __future__ import annotations

from megacpp_nemo.contract.checks import Rule

# Values of each structure channel, the absent one left out: ids 0 to n - 1, and n for absent.
STRUCTURE_CHANNELS = {
    "category": 9,
    "dependency_level": 16,
    "ast_depth": 64,
    "sibling_index": 64,
    "node_type": 256,
}
STRUCTURE_SETS = {
    "core": ("category", "dependency_level"),
    "all": tuple(STRUCTURE_CHANNELS),
}


def structure_channels(choice: str | None) -> tuple[str, ...]:
    """Return the channels that a choice of `Features.structure` names, in the table's order.

    None names none of them; a choice that `is_structure_choice` refuses is a ValueError.
    """
    if choice is None:
        return ()
    named = STRUCTURE_SETS.get(choice) or tuple(choice.split("+"))
    if not set(named) <= set(STRUCTURE_CHANNELS) or len(set(named)) < len(named):
        raise ValueError(choice)
    return tuple(name for name in STRUCTURE_CHANNELS if name in named)


def is_structure_choice(choice: str) -> bool:
    """Return whether a text is `core`, `all`, or distinct channels joined by `+`."""
    try:
        return bool(structure_channels(choice))
    except ValueError:
        return False


STRUCTURE_CHOICE = Rule(
    f"'core', 'all', or channels joined by '+' ({', '.join(STRUCTURE_CHANNELS)})",
    is_structure_choice,
    (*STRUCTURE_SETS, *STRUCTURE_CHANNELS),
)
