"""The command, run in this process."""

from tests.cli.conftest import megacpp as megacpp
