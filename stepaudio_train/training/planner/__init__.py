"""Layouts and step times of large runs, from sizes alone (docs/planner.md)."""
