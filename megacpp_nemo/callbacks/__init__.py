"""Levers on a run in progress: FIRE, DASH, periodic shrink, ReDo and STP."""
