// out[m][n] = bias[n] (+ out[m][n]): what a product that adds to out begins with. Block: 256 elements of out, row by row.
#include "reduce.h"

namespace flm {

template <class OUT>
__global__ void __launch_bounds__(256)
start_bias(const float* __restrict__ bias_N, OUT* __restrict__ out_MN, int M, int N, int accumulate) {
  size_t at = (size_t)blockIdx.x * 256 + threadIdx.x;
  if (at >= (size_t)M * N) return;
  float v = bias_N[at % N];
  out_MN[at] = narrow<OUT>(accumulate ? widen(out_MN[at]) + v : v);
}

}  // namespace flm
