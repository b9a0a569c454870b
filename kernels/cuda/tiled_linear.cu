// linear.cu's product for many rows of x, with the same bits: a block makes 128 outputs for 64 rows, which its warps share
// through shared memory. Warp w has outputs 32 * (w / 2) .. + 31 and rows 32 * (w % 2) .. + 31, over all of K.
#include "slice.h"

namespace flm {

constexpr int kColumns = 64, kDeep = 64, kLead = kDeep + 16;  // rows of x, inputs of a stage, elements from row to row

template <class T>
__device__ __forceinline__ void load_stage(T* stage, const T* x_MK, int m0, int M, int k0, int K) {
#pragma unroll
  for (int i = 0; i < kColumns * kDeep / 8 / 256; ++i) {
    int piece = threadIdx.x + 256 * i, row = piece / (kDeep / 8), k = k0 + piece % (kDeep / 8) * 8, m = m0 + row;
    bool inside = m < M && k < K;
    cp_async16(stage + row * kLead + piece % (kDeep / 8) * 8, x_MK + (inside ? (size_t)m * K + k : 0), inside);
  }
  cp_async_commit();
}

template <class T, class OUT, int FORMAT, class S, int GROUP>
__global__ void __launch_bounds__(256)
tiled_linear(const T* __restrict__ x_MK, const uint4* __restrict__ codes, const S* __restrict__ scales,
             const float* __restrict__ bias_N, OUT* __restrict__ out_MN, int M, int N, int K, int k_tiles, int span,
             int accumulate) {
  constexpr int kStep = kSteps<FORMAT>, kTiles = 4 / kStep, ROWS = 2, COLS = 4;
  FLM_SMEM(T, stages, 2 * kColumns * kLead);
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int row_tile = blockIdx.x * 8 + warp / 2 * ROWS, row_tiles = (N + 15) / 16, m0 = blockIdx.y * kColumns;
  int spans = k_tiles / span, groups = GROUP ? k_tiles * kStep / max(GROUP, 1) : 0;

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
    slice.scales = scales + (size_t)base * groups * 16 + g;
    slice.load_scales(true);
  }
  float total[ROWS][COLS][4] = {};
  uint4 now[ROWS], next[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) next[r] = ldg_stream(code[r]);
  int slice_number = 0;

  load_stage<T>(stages, x_MK, m0, M, 0, K);
  for (int tile0 = 0, stage = 0; tile0 < k_tiles; tile0 += kTiles, stage ^= 1) {
    if (tile0 + kTiles < k_tiles) {
      load_stage<T>(stages + (stage ^ 1) * kColumns * kLead, x_MK, m0, M, (tile0 + kTiles) * kStep * 16, K);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const T* x = stages + stage * kColumns * kLead + (warp % 2 * 32 + g) * kLead + 4 * t;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      int tile = tile0 + i;
      if (tile >= k_tiles) break;
      memcpy(now, next, sizeof now);
      if (tile + 1 < k_tiles)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) next[r] = ldg_stream(code[r] + (size_t)(tile + 1) * 32);
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
        uint2 part[COLS];
#pragma unroll
        for (int c = 0; c < COLS; ++c)
          part[c] = *reinterpret_cast<const uint2*>(x + 8 * c * kLead + (i * kStep + s) * 16);
        slice.template step<FORMAT>(now, part, s);
        int done = tile * kStep + s + 1;
        if (GROUP && done % max(GROUP, 1) == 0) slice.end_group(done < k_tiles * kStep);
      }
      while (slice_number < 8 && spans * (slice_number + 1) / 8 * span <= tile + 1) {
        ++slice_number;  // where slices are empty, several end here
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int c = 0; c < COLS; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) total[r][c][e] += slice.acc[r][c][e], slice.acc[r][c][e] = 0.f;
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int c = 0; c < COLS; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int n = (row_tile + r) * 16 + g + 8 * (e >> 1), m = m0 + warp % 2 * 32 + 8 * c + 2 * t + (e & 1);
        if (n >= N || m >= M) continue;
        float v = total[r][c][e];
        if (bias_N) v += bias_N[n];
        size_t at = (size_t)m * N + n;
        out_MN[at] = narrow<OUT>(accumulate ? widen(out_MN[at]) + v : v);
      }
}

}  // namespace flm
