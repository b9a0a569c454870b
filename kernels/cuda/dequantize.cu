// Packed weights (weights.h) as rows of T, for a library that multiplies such: out[n][k] = narrow(scale * code + offset).
// The float32 product and sum are rounded as embedding.cu's are, so both give a weight the same bits.
//
// Warp: a tile of 16 rows by 16, 32 or 64 inputs, blockIdx.y the row tile behind row_tile0. Four lanes write 32 bytes of a
// row side by side.
#include "weights.h"

namespace flm {

template <class T, class S>
__device__ __forceinline__ uint32_t scaled(uint32_t both, S scale) {
  float low, high;
  unpack<T>(low, high, both);
  low = __fmul_rn(scale_of(scale), low), high = __fmul_rn(scale_of(scale), high);
  if (kHasOffset<S>) low = __fadd_rn(low, offset_of(scale)), high = __fadd_rn(high, offset_of(scale));
  return pair<T>(low, high);
}

// rows: of out, from row 16 * row_tile0 of the weights on; columns: of out, the padding of tiles left out.
template <class T, int FORMAT, class S, int GROUP>
__global__ void __launch_bounds__(256)
dequantize(const uint4* __restrict__ codes, const S* __restrict__ scales, T* __restrict__ out_NK, int row_tile0, int rows,
           int columns, int k_tiles) {
  constexpr int kStep = kSteps<FORMAT>;
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, tile = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (tile >= k_tiles) return;
  int row_tile = row_tile0 + blockIdx.y, row = blockIdx.y * 16 + g;
  int groups = GROUP ? k_tiles * kStep / max(GROUP, 1) : 0;
  uint4 all = ldg_stream(codes + ((size_t)row_tile * k_tiles + tile) * 32 + lane);
  const uint32_t words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
  for (int s = 0; s < kStep; ++s) {
    uint32_t a[4];
    Fragment<T, FORMAT>::get(a, words + s * kWords<FORMAT>);
    if (GROUP) {
      const S* scale = scales + ((size_t)row_tile * groups + (tile * kStep + s) / max(GROUP, 1)) * 16 + g;
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = scaled<T>(a[i], scale[i & 1 ? 8 : 0]);
    }
    int column = (tile * kStep + s) * 16 + 4 * t;
    if (column >= columns) continue;
    if (row < rows) *reinterpret_cast<uint2*>(out_NK + (size_t)row * columns + column) = make_uint2(a[0], a[2]);
    if (row + 8 < rows) *reinterpret_cast<uint2*>(out_NK + (size_t)(row + 8) * columns + column) = make_uint2(a[1], a[3]);
  }
}

}  // namespace flm
