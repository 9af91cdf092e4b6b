"""One Megatron-LM release: its flags, its symbols and what its layers read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megacpp_nemo.lowering.conditions import Condition

# What a layer of the pattern is, by the name that Megatron's `Symbols` gives it.
LAYERS = ("MAMBA", "ATTENTION", "MLP", "MOE", "GDN", "DS_ATTENTION", "MLA")


@dataclass(frozen=True)
class Flag:
    """One option of a release's parser.

    Args:
        name: Canonical spelling.
        action: `store`, `store_true`, `store_false`, `boolean_optional` or argparse's name.
        type: Name of the function that reads a value; None keeps the text.
        nargs: None for exactly one value, a number, `?`, `*` or `+`.
        choices: The accepted values, if they are listed.
        default: Value without the flag.
        dest: Name under which the release's code reads the value.
        aliases: Other accepted spellings; `--no-x` of a `boolean_optional` is one of them.
        const: Value of the flag without its optional value, or of `store_const`.
    """

    name: str
    action: str = "store"
    type: str | None = None
    nargs: int | str | None = None
    choices: tuple[Any, ...] | None = None
    default: Any = None
    dest: str = ""
    aliases: tuple[str, ...] = ()
    const: Any = None

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every accepted spelling, the canonical one first."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class DeadRule:
    """Flags that no layer of a hybrid model reads unless a condition holds.

    Args:
        flags: Canonical spellings.
        needs: What must hold for the flags to be read (`lowering.conditions`).
        why: What goes unread otherwise, with the upstream file that shows it.
    """

    flags: tuple[str, ...]
    needs: Condition
    why: str


@dataclass(frozen=True, kw_only=True)
class Release:
    """One Megatron-LM release.

    Args:
        name: Name in this package.
        package_version: Version of its megatron-core.
        commit: Commit of Megatron-LM; empty if it was not known.
        entry_script: Script that pretrains a hybrid model.
        deprecated_entry_scripts: Scripts that still do.
        pattern_flag: Flag of the layer pattern.
        deprecated_pattern_flags: Flags it still takes a pattern, or a part of one, from.
        symbols: Symbol of each kind of layer it has, by `LAYERS`.
        stage_separator: Symbol between pipeline stages in a pattern; None if it has none.
        mtp_separator: Symbol before a multi-token prediction part; None if it has none.
        stock_spec: Module and name of its own hybrid layer spec.
        carries_spec: Whether the spec package of this project supports it.
        num_layers_rule: `equals`: --num-layers must be the length of the pattern; `overridden`:
            the pattern sets it.
        flags: Its flags by every accepted spelling.
        dead: Rules for accepted flags that nothing reads.
        replaced: What to write instead of flags that only warn, by flag.
        bounded_mtp_experts: Whether expert layers beyond the first `--mtp-num-layers` places of a
            prediction part end training with an IndexError: the router's metrics have no room
            for them (core/transformer/moe/router.py).
        notes: What could not be read off its sources, or was inherited from another release.
    """

    name: str
    package_version: str
    commit: str
    entry_script: str
    deprecated_entry_scripts: tuple[str, ...]
    pattern_flag: str
    deprecated_pattern_flags: tuple[str, ...]
    symbols: Mapping[str, str]
    stage_separator: str | None
    mtp_separator: str | None
    stock_spec: tuple[str, str]
    carries_spec: bool
    num_layers_rule: str
    flags: Mapping[str, Flag] = field(repr=False)
    dead: tuple[DeadRule, ...] = field(default=(), repr=False)
    replaced: Mapping[str, str] = field(default_factory=dict, repr=False)
    bounded_mtp_experts: bool = False
    notes: tuple[str, ...] = ()

    def canonical(self, spelling: str) -> str:
        """Return the canonical spelling of a flag; KeyError if the release does not know it."""
        return self.flags[spelling].name

    def canonical_flags(self) -> Mapping[str, Flag]:
        """Return every flag once, by its canonical spelling."""
        return {flag.name: flag for spelling, flag in self.flags.items() if spelling == flag.name}
