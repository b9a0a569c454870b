// grouped_linear.cu's product for many rows a matrix, with the same bits: a block makes 128 rows of one matrix for 64 pairs,
// which its warps share through shared memory. Warp w has rows 32 * (w / 2) .. + 31 and pairs 32 * (w % 2) .. + 31.
//
// Block y is unit y of the plan (expert_plan.cu), or without one a piece of the pairs e, e + count, ... of matrix e.
#include "gated.h"

namespace flm {

constexpr int kColumns = 64, kDeep = 64, kLead = kDeep + 16;  // pairs, inputs of a stage, elements from row to row

template <class T, class OUT, int FORMAT, class S, int GROUP, bool GATED>
__global__ void __launch_bounds__(256)
tiled_grouped(const T* __restrict__ x, const uint4* __restrict__ codes, const S* __restrict__ scales,
              OUT* __restrict__ out, const int* __restrict__ starts, const int* __restrict__ units,
              const int* __restrict__ order, int pairs, int count, int divide, int N, int K, int x_lead, int out_lead,
              int row_tiles, int k_tiles, int span) {
  constexpr int kStep = kSteps<FORMAT>, kTiles = 4 / kStep, ROWS = 2, COLS = 4;
  FLM_SMEM(T, stages, 2 * kColumns * kLead);
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int pieces = gridDim.y / count, e = blockIdx.y / max(pieces, 1), done = blockIdx.y % max(pieces, 1) * kColumns;
  int rows = pairs / count;
  if (order) {
    if (blockIdx.y >= starts[count + 1]) return;
    e = units[2 * blockIdx.y], done = units[2 * blockIdx.y + 1];
    rows = starts[e + 1] - starts[e], order += starts[e];
  }
  auto pair_of = [&](int column) {
    return done + column >= rows ? -1 : order ? order[done + column] : (done + column) * count + e;
  };
  const T* source[2];  // of this thread's two pieces of a stage
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int p = pair_of((threadIdx.x + 256 * i) / 8);
    source[i] = p < 0 ? nullptr : x + (size_t)(p / divide) * x_lead;
  }
  auto load_stage = [&](int stage, int k0) {
    int k = k0 + threadIdx.x % 8 * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bool inside = source[i] && k < K;
      cp_async16(stages + (stage * kColumns + (threadIdx.x + 256 * i) / 8) * kLead + threadIdx.x % 8 * 8,
                 inside ? source[i] + k : x, inside);
    }
    cp_async_commit();
  };

  int row_tile = blockIdx.x * 8 + warp / 2 * ROWS, base = min(row_tile, row_tiles - 1);
  int spans = k_tiles / span, groups = GROUP ? k_tiles * kStep / max(GROUP, 1) : 0;
  Slice<T, S, GROUP, ROWS, COLS> slice;
  const uint4* code[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {  // rows behind the last are computed from the last, and not stored
    int row = min(row_tile + r, row_tiles - 1);
    code[r] = codes + ((size_t)e * row_tiles + row) * k_tiles * 32 + lane;
    slice.row_stride[r] = (row - base) * groups * 16;
  }
  if (GROUP) {
    slice.scales = scales + ((size_t)e * row_tiles + base) * groups * 16 + g;
    slice.load_scales(true);
  }
  float total[ROWS][COLS][4] = {};
  uint4 now[ROWS], next[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) next[r] = ldg_stream(code[r]);
  int slice_number = 0;

  load_stage(0, 0);
  for (int tile0 = 0, stage = 0; tile0 < k_tiles; tile0 += kTiles, stage ^= 1) {
    if (tile0 + kTiles < k_tiles) {
      load_stage(stage ^ 1, (tile0 + kTiles) * kStep * 16);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const T* part_x = stages + stage * kColumns * kLead + (warp % 2 * 32 + g) * kLead + 4 * t;
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
          part[c] = *reinterpret_cast<const uint2*>(part_x + 8 * c * kLead + (i * kStep + s) * 16);
        slice.template step<FORMAT>(now, part, s);
        int steps = tile * kStep + s + 1;
        if (GROUP && steps % max(GROUP, 1) == 0) slice.end_group(steps < k_tiles * kStep);
      }
      while (slice_number < 8 && spans * (slice_number + 1) / 8 * span <= tile + 1) {
        ++slice_number;  // where slices are empty, several end here
        slice.end_slice(total);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int c = 0; c < COLS; ++c)
#pragma unroll
      for (int i = 0; i < (GATED ? 2 : 4); ++i) {
        int n = GATED ? (row_tile + r) * 8 + g : (row_tile + r) * 16 + g + 8 * (i >> 1);
        int p = pair_of(warp % 2 * 32 + 8 * c + 2 * t + (i & 1));
        if (n >= N || p < 0) continue;
        float v = GATED ? silu_times(total[r][c][i], total[r][c][i + 2]) : total[r][c][i];
        out[(size_t)p * out_lead + n] = narrow<OUT>(v);
      }
}

}  // namespace flm
