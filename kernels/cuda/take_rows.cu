// out[s] = x[rows[s]]; a row is `units` of U. With `last` given, rows outside of 0..last become zeros.
#include "reduce.h"

namespace flm {

template <class U>
__global__ void __launch_bounds__(256)
take_rows(const U* __restrict__ x, const int* __restrict__ rows_S, U* __restrict__ out, int units, int first, int last) {
  int i = blockIdx.y * 256 + threadIdx.x;
  if (i >= units) return;
  int row = rows_S[blockIdx.x] - first;
  U value = {};
  if (row >= 0 && row < last) value = x[(size_t)row * units + i];
  out[(size_t)blockIdx.x * units + i] = value;
}

}  // namespace flm
