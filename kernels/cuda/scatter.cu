// out[index[i]] = value[i] for i < count, but where the index is -1. Indices that occur twice carry the same value.
#include "reduce.h"

namespace flm {

__global__ void __launch_bounds__(256)
scatter(const int* __restrict__ index, const int* __restrict__ value, int* __restrict__ out, int count) {
  int i = blockIdx.x * 256 + threadIdx.x;
  if (i < count && index[i] >= 0) out[index[i]] = value[i];
}

}  // namespace flm
