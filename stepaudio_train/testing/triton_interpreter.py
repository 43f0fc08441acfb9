"""Triton's interpreter, mended where it is wrong. TRITON_INTERPRET=1, set before the import, runs kernels on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """While it is open, tl.dot multiplies bfloat16 numbers; as it stands, their bits as integers (Triton 3.6 to 3.9).

    Products are exact in float32, as they are on a GPU.
    """
    multiply = InterpreterBuilder.create_dot

    def create_dot(self, a, b, total, *options):
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, total, *options)

    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield
