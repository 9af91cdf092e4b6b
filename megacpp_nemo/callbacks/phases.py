"""Where a run stands in its schedule: which actions were done, and whether a phase began.

- `Phase`: what a run trains on; a change of it between a checkpoint and its resumption is a
  phase boundary
- `Ledger`: the actions done and the phase, as a checkpoint keeps them
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.plasticity import Plasticity


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What a run trains on.

    Args:
        data: Which data: equal for the same files, tokenizer and sample order.
        seq_length: Tokens in a row.
    """

    data: str
    seq_length: int

    @classmethod
    def of(cls, datamodule: Any) -> Phase:
        """Return the phase of a run on a data module of this package, or another of NeMo's."""
        folder = getattr(datamodule, "index_mapping_dir", None)
        name = type(datamodule).__name__
        data = f"{name}:{Path(folder).name}" if folder else f"{name}:{datamodule!r}"
        return cls(data=data, seq_length=int(getattr(datamodule, "seq_length", 0)))

    def boundaries(self, before: Phase) -> tuple[str, ...]:
        """Return which boundaries lie between an earlier phase and this one."""
        found = []
        if self.data != before.data:
            found.append("data")
        if self.seq_length > before.seq_length:
            found.append("context")
        return tuple(found)


@dataclass
class Ledger:
    """What a checkpoint remembers of a schedule.

    Args:
        acted: Steps at which each lever acted, by its name.
        phase: The phase of the run that wrote the checkpoint; None in a run that starts anew.
    """

    acted: dict[str, list[int]] = field(default_factory=dict)
    phase: Phase | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger as plain data."""
        return asdict(self)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Ledger:
        """Return the ledger that `state_dict` gave."""
        phase = state["phase"]
        acted = {name: list(steps) for name, steps in state["acted"].items()}
        return cls(acted=acted, phase=phase and Phase(**phase))

    def did(self, lever: str, step: int) -> None:
        """Note that a lever acted after a step."""
        self.acted.setdefault(lever, []).append(step)

    def refuse_past(self, plasticity: Plasticity, step: int) -> None:
        """Refuse a schedule with a step that the run is past, and at which nothing was done.

        Raises:
            RuntimeRefusal: Naming the lever and the steps.
        """
        for name in plasticity.on:
            steps = getattr(getattr(plasticity, name), "steps", ())
            past = [due for due in steps if due <= step and due not in self.acted.get(name, ())]
            if past:
                later = tuple(due for due in steps if due > step)
                raise RuntimeRefusal(
                    f"A step at which {name} is to act is already past",
                    given=f"plasticity.{name}.steps={steps}, and the run starts after step {step}"
                    + (f"; {name} acted at {self.acted[name]}" if self.acted.get(name) else ""),
                    allowed=f"steps above {step}, or at which it acted before the checkpoint",
                    hint=f"plasticity.{name}.steps={later or (step + 1,)}",
                )
