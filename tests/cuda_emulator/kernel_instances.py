"""The instances that the build check compiles, with the most registers that each may take.

65,536 registers a multiprocessor: 32 for 2,048 threads, 64 for 1,024, 128 for 512.
"""

from __future__ import annotations

from flm.kernels.cuda import (
    adapters,
    all_reduce,
    attention,
    classic,
    elementwise,
    experts,
    grouped,
    latent,
    library_products,
    linear,
    recurrent,
    rope,
    sampling,
    staging,
)
from flm.kernels.cuda.kernel import Kernel, instance


def _linear(activation: str, out: str, format: int, scale: str, group: int, rows: int, cols: int) -> Kernel:
    return instance("linear.cu", "linear", activation, out, format, scale, group, rows, cols)


def _grouped(
    activation: str, out: str, format: int, scale: str, group: int, rows: int, gated: bool
) -> Kernel:
    """rows 0: the tiled form."""
    shared = (activation, out, format, scale, group)
    if rows:
        return instance("grouped_linear.cu", "grouped_linear", *shared, rows, gated)
    return instance("tiled_grouped.cu", "tiled_grouped", *shared, gated)


def _tiled(activation: str, out: str, format: int, scale: str, group: int, rows: int, along: int) -> Kernel:
    parameters = activation, out, format, scale, group, rows, along
    return instance("tiled_linear.cu", "tiled_linear", *parameters)


INSTANCES: dict[Kernel, int] = {
    elementwise.rms_norm_kernel("float32", "float16", 4096): 48,
    elementwise.rms_norm_kernel("bfloat16", "bfloat16", 4096): 48,
    elementwise.rms_norm_kernel("float32", "bfloat16", 1): 40,
    elementwise.silu_mul_kernel("float16", 4096): 40,
    elementwise.silu_mul_kernel("bfloat16", 4096): 40,
    elementwise.silu_mul_kernel("bfloat16", 1): 32,
    classic.layer_norm_kernel("float32", "bfloat16", 4096): 48,
    classic.layer_norm_kernel("float32", "float32", 4096): 48,
    classic.gelu_kernel("bfloat16", 8): 40,
    classic.gelu_kernel("float16", 1): 32,
    elementwise.take_rows_kernel(2): 32,
    elementwise.take_rows_kernel(16): 32,
    rope.kernel("float16", "float16"): 64,
    rope.kernel("bfloat16", "bfloat16"): 64,
    rope.kernel("bfloat16", "int8"): 64,
    # int4, groups of 128: two blocks a multiprocessor, and one for more than 8 tokens
    _linear("float16", "float16", 4, "__half2", 8, 4, 1): 128,
    _linear("bfloat16", "bfloat16", 4, "__half2", 8, 4, 1): 128,
    _linear("bfloat16", "bfloat16", 4, "__half2", 8, 2, 1): 128,
    _linear("bfloat16", "bfloat16", 4, "__half2", 8, 1, 1): 128,
    _linear("bfloat16", "bfloat16", 4, "__half2", 8, 4, 2): 255,
    _linear("bfloat16", "bfloat16", 4, "float2", 2, 4, 1): 255,
    _linear("float16", "float32", 8, "__half", 2, 2, 1): 255,
    _linear("bfloat16", "bfloat16", 8, "__half", 8, 4, 1): 128,
    _linear("bfloat16", "bfloat16", 8, "__half2", 1, 4, 2): 255,
    _linear("bfloat16", "bfloat16", 9, "float", 8, 4, 1): 128,
    _linear("bfloat16", "float32", 16, "float", 0, 4, 1): 128,
    _linear("float16", "float16", 16, "float", 0, 4, 2): 128,
    _tiled("bfloat16", "bfloat16", 4, "__half2", 8, 2, 4): 255,
    _tiled("bfloat16", "bfloat16", 4, "__half2", 8, 1, 4): 128,
    _tiled("float16", "float16", 4, "float2", 2, 2, 4): 255,
    _tiled("bfloat16", "bfloat16", 8, "__half", 8, 2, 4): 255,
    _tiled("bfloat16", "bfloat16", 9, "float", 8, 2, 4): 255,
    _tiled("bfloat16", "bfloat16", 16, "float", 0, 4, 2): 255,
    _tiled("float16", "float32", 16, "float", 0, 1, 4): 128,
    instance("embedding.cu", "embedding", "bfloat16", "float32", 4, "__half2", 8): 48,
    instance("embedding.cu", "embedding", "bfloat16", "float32", 8, "__half2", 1): 48,
    instance("embedding.cu", "embedding", "float16", "float16", 16, "float", 0): 40,
    linear.take_columns_kernel(): 32,
    instance("dequantize.cu", "dequantize", "bfloat16", 4, "__half2", 8): 48,
    instance("dequantize.cu", "dequantize", "bfloat16", 9, "float", 8): 48,
    instance("dequantize.cu", "dequantize", "float16", 8, "__half2", 1): 48,
    instance("dequantize.cu", "dequantize", "float16", 16, "float", 0): 40,
    library_products.start_bias_kernel("bfloat16"): 32,
    **dict.fromkeys(adapters.kernels("bfloat16", 4096), 48),
    **dict.fromkeys(adapters.kernels("float16", 1), 40),
    # experts: two blocks a multiprocessor for few tokens, one for many
    experts.route_kernel("float32", 64): 64,
    experts.route_kernel("float32", 512): 128,
    grouped.plan_kernel(): 64,
    _grouped("bfloat16", "bfloat16", 4, "__half2", 8, 4, True): 128,
    _grouped("bfloat16", "float32", 4, "__half2", 8, 4, False): 128,
    _grouped("bfloat16", "float32", 4, "__half2", 8, 1, False): 128,
    _grouped("float16", "float16", 4, "float2", 2, 4, True): 255,
    _grouped("bfloat16", "bfloat16", 8, "__half", 8, 4, True): 128,
    _grouped("bfloat16", "float32", 9, "float", 8, 4, False): 128,
    _grouped("bfloat16", "bfloat16", 16, "float", 0, 4, True): 128,
    _grouped("bfloat16", "bfloat16", 4, "__half2", 8, 0, True): 255,
    _grouped("float16", "float32", 9, "float", 8, 0, False): 255,
    _grouped("bfloat16", "float32", 16, "float", 0, 0, False): 255,
    experts.combine_kernel("bfloat16", 2048): 64,
    instance("expert_down.cu", "expert_down", "bfloat16", 4, "__half2", 8): 224,
    instance("expert_down.cu", "expert_down", "bfloat16", 9, "float", 8): 224,
    instance("expert_down.cu", "expert_down", "float16", 4, "float2", 2): 255,
    instance("expert_down.cu", "expert_down", "bfloat16", 16, "float", 0): 224,
    **dict.fromkeys(recurrent.kernels("bfloat16"), 64),
    # latent attention: shared memory leaves room for two blocks of 128 threads a multiprocessor
    **dict.fromkeys(latent.attention_kernels("bfloat16", 512), 224),
    **dict.fromkeys(latent.attention_kernels("float16", 256), 168),
    latent.write_kernel("bfloat16"): 48,
    experts.scale_kernel("float32", "bfloat16", 2048, False): 40,
    experts.scale_kernel("bfloat16", "float16", 2048, True): 40,
    staging.scatter_kernel(): 32,
    **dict.fromkeys(sampling.kernels(), 64),
    **dict.fromkeys(all_reduce.kernels("bfloat16"), 64),
    instance("all_reduce.cu", "broadcast", "float32"): 64,
    all_reduce.fused_kernel("float32", "float16"): 64,
    all_reduce.fused_kernel("bfloat16", "bfloat16"): 64,
    # attention: of decode two blocks of 128 threads a multiprocessor at least, of prefill one of 256
    **dict.fromkeys(attention.kernels("float16", "float16", 64), 255),
    **dict.fromkeys(attention.kernels("bfloat16", "bfloat16", 128), 255),
    **dict.fromkeys(attention.kernels("bfloat16", "int8", 128), 255),
    **dict.fromkeys(attention.kernels("float16", "int8", 96), 255),
    **dict.fromkeys(attention.kernels("bfloat16", "bfloat16", 192), 255),
    **dict.fromkeys(attention.kernels("bfloat16", "int8", 256), 255),
    attention.kernels("bfloat16", "bfloat16", 64)[0]: 168,
    attention.kernels("bfloat16", "bfloat16", 256)[2]: 255,
}
