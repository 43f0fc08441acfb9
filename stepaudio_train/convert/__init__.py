"""Weights and directories of every format, in and out."""
