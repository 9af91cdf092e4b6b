"""NeMo-Run's command line in this process, and what it made of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


class CommandLine:
    """`nemo` in this process; nothing it is asked to run is run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import nemo_run
        from nemo_run.cli.api import create_cli
        from typer.testing import CliRunner

        self.seen: list[Any] = []
        self._runner = CliRunner()
        monkeypatch.setattr("sys.argv", ["nemo", "llm"])
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(nemo_run, "dryrun_fn", lambda task, **_: self.seen.append(task))
        self._app = create_cli(nested_entrypoints_creation=False)

    def __call__(self, *args: str) -> Any:
        """Return typer's result of `nemo llm ARGS`."""
        self.seen.clear()
        return self._runner.invoke(self._app, ["llm", *args])

    def resolved(self, factory: str, *overrides: str, command: str = "pretrain") -> Any:
        """Return the configuration that a command line resolves to."""
        result = self(command, "--factory", factory, *overrides, "--dryrun")
        assert result.exit_code == 0, result.output
        (task,) = self.seen
        return task

    def refused(self, factory: str, *overrides: str, command: str = "pretrain") -> str:
        """Return what a command line that cannot be read prints, four parts and no more."""
        result = self(command, "--factory", factory, *overrides, "--dryrun")
        assert result.exit_code == 1
        assert self.seen == []
        first, *parts = result.stderr.strip().split("\n")
        assert first.startswith("Unexpected error: ")
        assert [part[:11] for part in parts] == ["  given:   ", "  allowed: ", "  try:     "]
        assert len(result.stderr) < 1500
        return result.stderr


@pytest.fixture(scope="session", autouse=True)
def _imported_once() -> None:
    import megacpp_nemo.recipes  # noqa: F401 - forked runs share it


@pytest.fixture
def nemo(monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(monkeypatch)


@pytest.fixture
def build() -> Callable[[Any], Any]:
    import fiddle

    return fiddle.build
