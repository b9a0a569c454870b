// out[m][n] = sum over k of x[m][k] * weight[n][k] (+ bias[n]) (+ out[m][n]) on tensor cores, for few rows of x.
//
// The weights are mma's 16-row operand A and the rows of x the 8 columns of B, so that a weight costs about one
// instruction whatever the batch. A block makes 16 * ROWS outputs for 8 * COLS rows of x (blockIdx.y says which); each of
// its 8 warps takes an eighth of K and reads its own part of x. Weights come through a ring of registers.
//
// For many rows there is tiled_linear.cu, which gives the same bits.
#include "slice.h"

namespace flm {

// x of one tile for this lane: 4 inputs of each step for row g of each 8; zeros outside of x.
template <class T, int STEPS, int COLS>
__device__ __forceinline__ void load_x(uint2 (&to)[COLS][STEPS], const T* x_MK, int m, int M, int k, int K) {
#pragma unroll
  for (int c = 0; c < COLS; ++c)
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      to[c][s] = make_uint2(0u, 0u);
      if (m + 8 * c < M && k + 16 * s < K)
        to[c][s] = *reinterpret_cast<const uint2*>(x_MK + (size_t)(m + 8 * c) * K + k + 16 * s);
    }
}

// k_tiles: tiles along K, padding included; span: tiles of which a slice has a whole number, groups included.
template <class T, class OUT, int FORMAT, class S, int GROUP, int ROWS, int COLS>
__global__ void __launch_bounds__(256, COLS == 1 && (GROUP == 0 || GROUP > 2) ? 2 : 1)
linear(const T* __restrict__ x_MK, const uint4* __restrict__ codes, const S* __restrict__ scales,
       const float* __restrict__ bias_N, OUT* __restrict__ out_MN, int M, int N, int K, int k_tiles, int span,
       int accumulate) {
  constexpr int kStep = kSteps<FORMAT>, kDepth = ROWS > 2 ? 2 : 4;
  FLM_SMEM(float, parts, 8 * COLS * 8 * ROWS * 16);  // [warp][column][row]
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int row_tile = blockIdx.x * ROWS, row_tiles = (N + 15) / 16, m0 = blockIdx.y * 8 * COLS;
  int spans = k_tiles / span, tile = spans * warp / 8 * span, last = spans * (warp + 1) / 8 * span;
  int groups = GROUP ? k_tiles * kStep / GROUP : 0;

  Slice<T, S, GROUP, ROWS, COLS> slice;
  const uint4* code[ROWS];
  int base = min(row_tile, row_tiles - 1);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {  // rows behind the last are computed from the last, and not stored
    int row = min(row_tile + r, row_tiles - 1);
    code[r] = codes + (size_t)row * k_tiles * 32 + lane;
    slice.row_stride[r] = (row - base) * groups * 16;
  }
  if (GROUP) {
    slice.scales = scales + ((size_t)base * groups + tile * kStep / max(GROUP, 1)) * 16 + g;
    slice.load_scales(tile < last);
  }

  uint4 ring[kDepth][ROWS];
  uint2 x_next[COLS][kStep];
  auto load_tile = [&](uint4(&to)[ROWS], int number) {
    if (number >= last) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) to[r] = ldg_stream(code[r] + (size_t)number * 32);
  };
#pragma unroll
  for (int i = 0; i < kDepth; ++i) load_tile(ring[i], tile + i);
  load_x<T>(x_next, x_MK, m0 + g, M, tile * kStep * 16 + 4 * t, tile < last ? K : 0);
  for (; tile < last; tile += kDepth) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (tile + i >= last) break;
      uint2 x_now[COLS][kStep];
      memcpy(x_now, x_next, sizeof x_now);
      load_x<T>(x_next, x_MK, m0 + g, M, (tile + i + 1) * kStep * 16 + 4 * t, tile + i + 1 < last ? K : 0);
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
        uint2 x[COLS];
#pragma unroll
        for (int c = 0; c < COLS; ++c) x[c] = x_now[c][s];
        slice.template step<FORMAT>(ring[i], x, s);
        int done = (tile + i) * kStep + s + 1;
        if (GROUP && done % max(GROUP, 1) == 0) slice.end_group(done < last * kStep);
      }
      load_tile(ring[i], tile + i + kDepth);
    }
  }

#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int c = 0; c < COLS; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int row = 16 * r + g + 8 * (i >> 1), column = 8 * c + 2 * t + (i & 1);
        parts[(warp * 8 * COLS + column) * 16 * ROWS + row] = slice.acc[r][c][i];
      }
  __syncthreads();
  for (int o = threadIdx.x; o < 8 * COLS * 16 * ROWS; o += 256) {
    int n = row_tile * 16 + o % (16 * ROWS), m = m0 + o / (16 * ROWS);
    if (n >= N || m >= M) continue;
    float v = 0.f;
#pragma unroll
    for (int w = 0; w < 8; ++w) v += parts[w * 8 * COLS * 16 * ROWS + o];
    if (bias_N) v += bias_N[n];
    size_t at = (size_t)m * N + n;
    out_MN[at] = narrow<OUT>(accumulate ? widen(out_MN[at]) + v : v);
  }
}

}  // namespace flm
