// LayerNorm, with x = keep * x + delta first where `delta` is given: out = (x - mean) / sqrt(variance + eps) * weight + bias.
// Block t is token t. X is the residual stream's type, T that of delta and out; weight and bias are float. V: elements a
// thread handles at once, a divisor of E. replace: x becomes out, unrounded. The sums' order depends on E alone.
#include "reduce.h"

namespace flm {

template <class X, class T, int V>
__global__ void __launch_bounds__(256)
layer_norm(X* x_TE, const T* delta_TE, const float* __restrict__ weight_E, const float* __restrict__ bias_E, T* out_TE,
           int E, float eps, float keep, int replace) {
  FLM_SMEM(float, warp_sums, 16);
  size_t row = (size_t)blockIdx.x * E;
  float sum = 0.f, v[V], d[V], b[V];
  for (int i = threadIdx.x * V; i < E; i += 256 * V) {  // each thread reads later what it writes here
    load<X, V>(v, x_TE + row + i);
    if (delta_TE) {
      load<T, V>(d, delta_TE + row + i);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] = widen(narrow<X>(__fadd_rn(__fmul_rn(keep, v[j]), d[j])));
      store<X, V>(x_TE + row + i, v);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) sum += v[j];
  }
  float mean = block_sum<8>(sum, warp_sums) / E, squares = 0.f;
  for (int i = threadIdx.x * V; i < E; i += 256 * V) {
    load<X, V>(v, x_TE + row + i);
#pragma unroll
    for (int j = 0; j < V; ++j) squares += (v[j] - mean) * (v[j] - mean);
  }
  float scale = rsqrtf(block_sum<8>(squares, warp_sums + 8) / E + eps);
  for (int i = threadIdx.x * V; i < E; i += 256 * V) {
    load<X, V>(v, x_TE + row + i);
    load<float, V>(d, weight_E + i);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = (v[j] - mean) * scale * d[j];
    if (bias_E) {
      load<float, V>(b, bias_E + i);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] += b[j];
    }
    if (replace) store<X, V>(x_TE + row + i, v);
    store<T, V>(out_TE + row + i, v);
  }
}

}  // namespace flm
