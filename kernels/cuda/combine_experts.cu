// out[t] (+)= the sum over k, in order, of weights[t][k] * parts[t * K + k], of those experts that are here.
// V: elements a thread handles, a divisor of E.
#include "reduce.h"

namespace flm {

template <class T, int V>
__global__ void __launch_bounds__(256)
combine_experts(const float* __restrict__ parts, const int* __restrict__ ids_TK, const float* __restrict__ weights_TK,
                T* __restrict__ out_TE, int K, int E, int first, int count, int accumulate) {
  int e = (blockIdx.y * 256 + threadIdx.x) * V;
  if (e >= E) return;
  size_t t = blockIdx.x;
  float sum[V] = {}, part[V];
  if (accumulate) load<T, V>(sum, out_TE + t * E + e);
  for (int k = 0; k < K; ++k) {
    int expert = ids_TK[t * K + k] - first;
    if (expert < 0 || expert >= count) continue;
    float weight = weights_TK[t * K + k];
    load<float, V>(part, parts + (t * K + k) * E + e);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = __fmaf_rn(weight, part[j], sum[j]);
  }
  store<T, V>(out_TE + t * E + e, sum);
}

}  // namespace flm
