// out[m][n] = sum over k of x[m][k] * weight[n][k] (+ bias[n]) (+ out[m][n]) on tensor cores, for few rows of x.
//
// The weights are mma's 16-row operand A and the rows of x the 8 columns of B, so that a weight costs about one
// instruction whatever the batch. A block makes 16 * ROWS outputs for 8 * COLS rows of x (blockIdx.y says which); each of
// its 8 warps takes an eighth of K and reads its own part of x. Weights come through a ring of registers.
//
// For many rows there is tiled_linear.cu, which gives the same bits.
#include "slice.h"

namespace flm {

// x of one tile for this lane: 4 inputs of each step for row g of each 8, zeros from `inputs` on. at: of the first of them.
template <class T, int STEPS, int COLS>
__device__ __forceinline__ void load_x(uint2 (&to)[COLS][STEPS], const T* const (&rows)[COLS], int at, bool whole,
                                       int inputs) {
#pragma unroll
  for (int c = 0; c < COLS; ++c)
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
      if (whole || 16 * s < inputs) to[c][s] = *reinterpret_cast<const uint2*>(rows[c] + at + 16 * s);
      else to[c][s] = make_uint2(0u, 0u);
}

// k_tiles: tiles along K, padding included; span: tiles of which a slice has a whole number, groups included.
template <class T, class OUT, int FORMAT, class S, int GROUP, int ROWS, int COLS>
__global__ void __launch_bounds__(256, COLS == 1 && (GROUP == 0 || GROUP > 2) ? 2 : 1)
linear(const T* __restrict__ x_MK, const uint4* __restrict__ codes, const S* __restrict__ scales,
       const float* __restrict__ bias_N, OUT* __restrict__ out_MN, int M, int N, int K, int k_tiles, int span,
       int accumulate) {
  constexpr int kStep = kSteps<FORMAT>, kDepth = 8 / ROWS;
  constexpr int kSpan = GROUP > kStep ? GROUP / kStep : 1;  // tiles of a group, at whose borders slices begin
  FLM_SMEM(float, parts, 8 * COLS * 8 * ROWS * 16);  // [warp][column][row]
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int row_tile = blockIdx.x * ROWS, row_tiles = (N + 15) / 16, m0 = blockIdx.y * 8 * COLS;
  int spans = k_tiles / span, tile = spans * warp / 8 * span, last = spans * (warp + 1) / 8 * span;
  int groups = GROUP ? k_tiles * kStep / GROUP : 0;

  Slice<T, S, GROUP, ROWS, COLS> slice;
  int base = min(row_tile, row_tiles - 1), code_stride[ROWS];
  const uint4* code = codes + ((size_t)base * k_tiles + tile) * 32 + lane;  // at `tile`, as `rows`
  const T* rows[COLS];
  int whole = min(last, K / (16 * kStep));  // tiles that end before K
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

  uint4 ring[kDepth][ROWS];
  uint2 x_next[COLS][kStep];
  auto load_tile = [&](uint4(&to)[ROWS], int ahead) {
    if (tile + ahead >= last) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) to[r] = ldg_stream(code + code_stride[r] + ahead * 32);
  };
  auto load_next = [&](int ahead) {
    int number = tile + ahead;
    if (number < whole) load_x(x_next, rows, ahead * kStep * 16, true, 0);
    else if (number < last) load_x(x_next, rows, ahead * kStep * 16, false, K - number * kStep * 16 - 4 * t);
  };
#pragma unroll
  for (int i = 0; i < kDepth; ++i) load_tile(ring[i], i);
  load_next(0);
  while (tile < last) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (tile + i >= last) break;
      uint2 x_now[COLS][kStep];
      memcpy(x_now, x_next, sizeof x_now);
      load_next(i + 1);
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
        uint2 x[COLS];
#pragma unroll
        for (int c = 0; c < COLS; ++c) x[c] = x_now[c][s];
        slice.template step<FORMAT>(ring[i], x, s);
        if (ends_group<GROUP, kStep>(kDepth % kSpan ? tile + i : i, s)) slice.end_group(s + 1 < kStep || tile + i + 1 < last);
      }
      load_tile(ring[i], i + kDepth);
    }
    tile += kDepth;
    code += kDepth * 32;
#pragma unroll
    for (int c = 0; c < COLS; ++c) rows[c] += kDepth * kStep * 16;
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
