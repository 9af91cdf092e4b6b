"""How many examples the property tests of this folder take: as many as fit into seconds."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "lowering",
    deadline=None,
    derandomize=True,
    # Drawing a whole recipe is slower than Hypothesis expects of a draw.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
