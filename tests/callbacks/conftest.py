"""The sources and the starting checkpoint of the runtime's tests, for runs with levers."""

from tests.runtime.conftest import checkpoint, sources

__all__ = ["checkpoint", "sources"]
