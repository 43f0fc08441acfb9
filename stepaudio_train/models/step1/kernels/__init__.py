"""Triton kernels of the language model, and the PyTorch operations that launch them (docs/kernels.md)."""
