// out[m][c] = x[m][gather[c]], zero where gather is -1. 16-bit elements.
#include "reduce.h"

namespace flm {

__global__ void __launch_bounds__(256)
take_columns(const uint16_t* __restrict__ x_MK, const int* __restrict__ gather, uint16_t* __restrict__ out_MC, int K,
             int C) {
  int c = blockIdx.y * 256 + threadIdx.x;
  if (c >= C) return;
  int from = gather[c];
  out_MC[(size_t)blockIdx.x * C + c] = from >= 0 ? x_MK[(size_t)blockIdx.x * K + from] : 0;
}

}  // namespace flm
