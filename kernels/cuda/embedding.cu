// out[t] = factor * weight[ids[t] - first], zeros where that is outside of 0..N, from packed weights (weights.h).
// With the numbers 0..N for ids it is the whole matrix, row by row. Block: one id; thread: four neighbours of a row.
#include "weights.h"

namespace flm {

template <class T, class OUT, int FORMAT, class S, int GROUP>
__global__ void __launch_bounds__(256)
embedding(const uint4* __restrict__ codes, const S* __restrict__ scales, const int* __restrict__ gather,
          const int* __restrict__ ids_T, OUT* __restrict__ out_TE, int N, int E, int columns, int k_tiles, int first,
          float factor) {
  constexpr int kStep = kSteps<FORMAT>;
  int row = ids_T[blockIdx.x] - first, at = (blockIdx.y * 256 + threadIdx.x) * 4;
  if (at >= columns) return;
  OUT* out = out_TE + (size_t)blockIdx.x * E;
  float v[4] = {0.f, 0.f, 0.f, 0.f};
  if (row >= 0 && row < N) {
    int tile = at / (16 * kStep), s = at / 16 % kStep, lane = row % 8 * 4 + at % 16 / 4, half = row % 16 / 8;
    uint4 all = codes[((size_t)(row / 16) * k_tiles + tile) * 32 + lane];
    const uint32_t words[4] = {all.x, all.y, all.z, all.w};
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < kStep; ++i)
      if (i == s) Fragment<T, FORMAT>::get(a, words + i * kWords<FORMAT>);
    unpack<T>(v[0], v[1], half ? a[1] : a[0]);
    unpack<T>(v[2], v[3], half ? a[3] : a[2]);
    if (GROUP) {
      int groups = k_tiles * kStep / max(GROUP, 1), group = at / (16 * max(GROUP, 1));
      S scale = scales[((size_t)(row / 16) * groups + group) * 16 + row % 16];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = __fadd_rn(__fmul_rn(scale_of(scale), v[i]), offset_of(scale));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int column = gather ? gather[at + i] : at + i;
    if (column >= 0) out[column] = narrow<OUT>(factor * v[i]);
  }
}

}  // namespace flm
