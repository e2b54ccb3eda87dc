"""Triton's interpreter, which runs kernels on a CPU: `install` it before anything imports Triton."""

import os

os.environ["TRITON_INTERPRET"] = "1"
import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter


def install() -> None:
    """Triton 3.6 takes arrays of one element as numbers, which NumPy 2.4 refuses, and cuts bfloat16 off.

    A GPU rounds to the nearest.
    """
    patch_tensor, cast = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def rounded(self, source, kind):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            numbers = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return interpreter.TensorHandle(numbers.view(torch.uint16).numpy(), kind.scalar)
        return cast(self, source, kind)

    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.cast_impl = rounded
