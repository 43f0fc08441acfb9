"""Conversations in other projects' formats -> records (docs/importing.md)."""
