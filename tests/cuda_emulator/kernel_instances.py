"""The instances that the build check compiles, with the most registers that each may take.

65,536 registers a multiprocessor: 32 for 2,048 threads, 64 for 1,024, 128 for 512.
"""

from __future__ import annotations

from flm.kernels.cuda import elementwise, rope
from flm.kernels.cuda.kernel import Kernel

INSTANCES: dict[Kernel, int] = {
    elementwise.rms_norm_kernel("float32", "float16", 4096): 48,
    elementwise.rms_norm_kernel("bfloat16", "bfloat16", 4096): 48,
    elementwise.rms_norm_kernel("float32", "bfloat16", 1): 40,
    elementwise.silu_mul_kernel("float16", 4096): 40,
    elementwise.silu_mul_kernel("bfloat16", 4096): 40,
    elementwise.silu_mul_kernel("bfloat16", 1): 32,
    elementwise.take_rows_kernel(2): 32,
    elementwise.take_rows_kernel(16): 32,
    rope.kernel("float16", "float16"): 64,
    rope.kernel("bfloat16", "bfloat16"): 64,
    rope.kernel("bfloat16", "int8"): 64,
}
