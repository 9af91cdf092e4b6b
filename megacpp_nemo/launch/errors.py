"""What is wrong with a launch, and how a run ended that failed."""

from __future__ import annotations

import functools
from typing import Any

from megacpp_nemo.contract.errors import MegaCppError


class LaunchError(MegaCppError):
    """A launch that cannot start: its files, its options, or the machine it is started from."""


class RunFailed(MegaCppError):  # noqa: N818 - the run failed, the launch did what it should
    """A run that was started and failed.

    Args:
        what: What ended, as a sentence without a final full stop.
        lines: The last lines of the rank that failed first.
        exit_status: That rank's own code, or 1: what the command ends with.
        given: Where the rank's log is.
        allowed: What a run does that succeeds.
        hint: How to see more.
    """

    def __init__(
        self,
        what: str,
        *,
        lines: tuple[str, ...] = (),
        exit_status: int = 1,
        given: str | None = None,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what, given=given, allowed=allowed, hint=hint)
        self.lines, self.exit_status = lines, exit_status

    def __reduce__(self) -> tuple[object, ...]:
        parts: dict[str, Any] = {"given": self.given, "allowed": self.allowed, "hint": self.hint}
        parts |= {"lines": self.lines, "exit_status": self.exit_status}
        return functools.partial(type(self), self.what, **parts), ()
