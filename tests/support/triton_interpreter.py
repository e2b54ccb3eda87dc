"""Triton's interpreter, which runs kernels on a CPU: `install` it before anything imports Triton."""

import os

os.environ["TRITON_INTERPRET"] = "1"
import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter


def install() -> None:
    """Triton 3.6 takes arrays of one element as numbers, which NumPy 2.4 refuses, and cuts bfloat16 off.

    A GPU rounds to the nearest. In products it takes the bits of bfloat16 for integers.
    """
    patch_tensor, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def rounded(self, source, kind):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            numbers = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return interpreter.TensorHandle(numbers.view(torch.uint16).numpy(), kind.scalar)
        return cast(self, source, kind)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter._patch_lang_tensor = patch
    builder.cast_impl = rounded
    builder.create_dot = lambda self, a, b, *others: dot(self, widened(a), widened(b), *others)
