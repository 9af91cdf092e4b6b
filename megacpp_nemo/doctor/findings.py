"""What a check says, and the report that all of them make."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

SCHEMA = 1


class State(Enum):
    """How a thing is.

    `OK` works; `LIMITED` is missing or odd and costs something that training here can do without;
    `BROKEN` stops training here; `UNCHECKED` was not looked at.
    """

    OK = "ok"
    LIMITED = "limited"
    BROKEN = "broken"
    UNCHECKED = "unchecked"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check says.

    Args:
        key: Stable name, as in `package.leptonai`.
        name: What was looked at, in words.
        state: How it is.
        found: What is there: a version, a path, an error.
        says: What is wrong, or what the missing piece costs; empty where nothing is to say.
        fix: The command that repairs it; empty where there is none.
    """

    key: str
    name: str
    state: State
    found: str = ""
    says: str = ""
    fix: str = ""

    @property
    def group(self) -> str:
        """The part of the report it belongs to: what stands before the key's first dot."""
        return self.key.partition(".")[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain data."""
        return {**asdict(self), "state": self.state.value}


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings of one examination.

    Args:
        findings: In the order of the report.
        quick: Whether the imports were left out.
        seconds: How long it took.
    """

    findings: tuple[Finding, ...]
    quick: bool
    seconds: float

    @property
    def faults(self) -> tuple[Finding, ...]:
        """What stops training here."""
        return tuple(f for f in self.findings if f.state is State.BROKEN)

    @property
    def ok(self) -> bool:
        """Whether nothing that was looked at stops training here."""
        return not self.faults

    @property
    def fixes(self) -> tuple[str, ...]:
        """The commands that repair the faults, causes before what follows from them."""
        return tuple(dict.fromkeys(fault.fix for fault in self.faults if fault.fix))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "quick": self.quick,
            "seconds": round(self.seconds, 2),
            "faults": [fault.key for fault in self.faults],
            "fixes": list(self.fixes),
            "findings": [finding.to_dict() for finding in self.findings],
        }
