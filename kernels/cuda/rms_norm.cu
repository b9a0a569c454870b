// RMSNorm, with the residual added first where `delta` is given: x += delta; out = x / sqrt(mean(x²) + eps) * weight.
// Block t is token t. X is the residual stream's type (float or T), T that of delta and out; weight is float.
// V: elements a thread handles at once, a divisor of E. The sum's order depends on E alone.
#include "reduce.h"

namespace flm {

template <class X, class T, int V>
__global__ void __launch_bounds__(256)
rms_norm(X* x_TE, const T* delta_TE, const float* __restrict__ weight_E, T* out_TE, int E, float eps) {
  FLM_SMEM(float, warp_sums, 8);
  size_t row = (size_t)blockIdx.x * E;
  float sum = 0.f, v[V], d[V];
  for (int i = threadIdx.x * V; i < E; i += 256 * V) {
    load<X, V>(v, x_TE + row + i);
    if (delta_TE) {
      load<T, V>(d, delta_TE + row + i);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] = widen(narrow<X>(v[j] + d[j]));
      store<X, V>(x_TE + row + i, v);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) sum += v[j] * v[j];
  }
  float scale = rsqrtf(block_sum<8>(sum, warp_sums) / E + eps);
  for (int i = threadIdx.x * V; i < E; i += 256 * V) {  // each thread reads what it wrote itself
    load<X, V>(v, x_TE + row + i);
    load<float, V>(d, weight_E + i);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = v[j] * scale * d[j];
    store<T, V>(out_TE + row + i, v);
  }
}

}  // namespace flm
