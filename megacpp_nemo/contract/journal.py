"""The journal of a run's levers, as it is read: one JSON line per event, in the run's folder.

A run that resumes says so, and what an earlier attempt wrote beyond that step no longer counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megacpp_nemo.contract.errors import DataError

# In a folder of its own: NeMo moves the files beside it away when a run resumes.
FILE_NAME = "plasticity/journal.jsonl"
SCHEMA = 1


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the events of a run that count, in order.

    Args:
        path: The run's folder, or the journal in it.

    Raises:
        DataError: If there is no journal, or a line before the last cannot be read. A last line
            cut short by a killed run is left out.
    """
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise DataError(
            "There is no journal of levers here",
            given=str(path),
            allowed=f"a run's folder with {FILE_NAME} in it, written where a lever is on",
            hint="runs/NAME of a run with plasticity",
        )
    events: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            step = event["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise DataError(
                f"Line {number} of a journal cannot be read",
                given=f"{path}: {line[:60]!r}",
                allowed="a JSON object with a step",
                hint=f"{path} without line {number}",
            ) from None
        if event["event"] == "start":
            events = [earlier for earlier in events if earlier["step"] <= step]
        events.append(event)
    return events
