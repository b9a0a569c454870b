// out[m][n] = sum over k of x[m][k] * weight[n][k] (+ bias[n]) (+ out[m][n]) on tensor cores, for few rows of x.
//
// The weights are mma's 16-row operand A and the rows of x the 8 columns of B, so that a weight costs about one
// instruction whatever the batch. A block makes 16 * ROWS outputs for 8 * COLS rows of x (blockIdx.y says which); each of
// its 8 warps takes an eighth of K and reads its own part of x.
//
// For many rows there is tiled_linear.cu, which gives the same bits.
#include "slice.h"

namespace flm {

// k_tiles: tiles along K, padding included; span: tiles of which a slice has a whole number, groups included.
template <class T, class OUT, int FORMAT, class S, int GROUP, int ROWS, int COLS>
__global__ void __launch_bounds__(256, COLS == 1 && (GROUP == 0 || GROUP > 2) ? 2 : 1)
linear(const T* __restrict__ x_MK, const uint4* __restrict__ codes, const S* __restrict__ scales,
       const float* __restrict__ bias_N, OUT* __restrict__ out_MN, int M, int N, int K, int k_tiles, int span,
       int accumulate) {
  constexpr int kStep = kSteps<FORMAT>, kPlaces = 8 * COLS * 16 * ROWS;
  FLM_SMEM(float, parts, 8 * kPlaces);  // [warp][column][row]
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int row_tile = blockIdx.x * ROWS, row_tiles = (N + 15) / 16, m0 = blockIdx.y * 8 * COLS;
  int spans = k_tiles / span, tile = spans * warp / 8 * span, last = spans * (warp + 1) / 8 * span;
  int groups = GROUP ? k_tiles * kStep / GROUP : 0;

  Slice<T, S, GROUP, ROWS, COLS> slice;
  int base = min(row_tile, row_tiles - 1), code_stride[ROWS];
  const uint4* code = codes + ((size_t)base * k_tiles + tile) * 32 + lane;  // at `tile`, as `rows`
  const T* rows[COLS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {  // rows behind the last are computed from the last, and not stored
    int row = min(row_tile + r, row_tiles - 1);
    code_stride[r] = (row - base) * k_tiles * 32;
    slice.row_stride[r] = (row - base) * groups * 16;
  }
#pragma unroll
  for (int c = 0; c < COLS; ++c) rows[c] = x_MK + (size_t)min(m0 + g + 8 * c, M - 1) * K + tile * kStep * 16 + 4 * t;
  if (GROUP) {
    slice.scales = scales + ((size_t)base * groups + tile * kStep / max(GROUP, 1)) * 16 + g;
    slice.load_scales(tile < last);
  }

  multiply<FORMAT, 8 / ROWS>(slice, code, code_stride, rows, tile, last, K, t);
  slice.put(parts + warp * kPlaces, g, t);
  __syncthreads();
  for (int o = threadIdx.x; o < kPlaces; o += 256) {
    int n = row_tile * 16 + o % (16 * ROWS), m = m0 + o / (16 * ROWS);
    if (n >= N || m >= M) continue;
    float v = sum_of_slices(parts, kPlaces, o);
    write_out(out_MN[(size_t)m * N + n], bias_N ? v + bias_N[n] : v, accumulate);
  }
}

}  // namespace flm
