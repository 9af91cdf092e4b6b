"""Data to edit: executors, profiles and pinned versions."""
