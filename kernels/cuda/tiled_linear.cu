// linear.cu's product for many rows of x, with the same bits: 8 warps share weights and x through shared memory, in a ring
// of stages of 64 inputs. WN warps lie along the outputs: a block makes 16 * ROWS * WN outputs for 32 * 8 / WN rows of x,
// a warp 16 * ROWS for 32, over all of K.
//
// Weights lie as their fragments do. Rows of x have 128 bytes in a stage, and piece p of 16 bytes lies where p ^ 2 * (row % 4)
// would, so that 4 rows' neighbours of 32 bytes, which half a warp reads at once, are in different banks.
#include "slice.h"

namespace flm {

constexpr int kDeep = 64;  // inputs of a stage

template <int FORMAT, int ROWS, int WN>
struct Stage {
  static constexpr int kTiles = 4 / kSteps<FORMAT>, kRowTiles = ROWS * WN, kColumns = 32 * 8 / WN;
  static constexpr int kCodes = kRowTiles * kTiles * 32, kPieces = kCodes + kColumns * kDeep / 8;
  static constexpr int kStages = FORMAT == kFloat16 ? 3 : 4;
};

template <class T, int FORMAT, int ROWS, int WN>
__device__ __forceinline__ void load_stage(uint4* stage, const uint4* codes, const T* x_MK, int row_tile0, int row_tiles,
                                           int tile0, int k_tiles, int m0, int M, int K) {
  using L = Stage<FORMAT, ROWS, WN>;
#pragma unroll
  for (int i = 0; i < (L::kCodes + 255) / 256; ++i) {
    if (threadIdx.x + 256 * i >= L::kCodes) break;
    int piece = threadIdx.x + 256 * i, row = min(row_tile0 + piece / (32 * L::kTiles), row_tiles - 1);
    int at = piece % (32 * L::kTiles), tile = tile0 + at / 32;
    bool inside = tile < k_tiles;
    cp_async16(stage + piece, codes + (inside ? ((size_t)row * k_tiles + tile0) * 32 + at : 0), inside);
  }
#pragma unroll
  for (int i = 0; i < L::kColumns * kDeep / 8 / 256; ++i) {
    int piece = threadIdx.x + 256 * i, row = piece / 8, k = tile0 * kSteps<FORMAT> * 16 + piece % 8 * 8, m = m0 + row;
    bool inside = m < M && k < K;
    cp_async16(stage + L::kCodes + row * 8 + (piece % 8 ^ (row & 3) * 2), x_MK + (inside ? (size_t)m * K + k : 0), inside);
  }
}

template <class T, class OUT, int FORMAT, class S, int GROUP, int ROWS, int WN>
__global__ void __launch_bounds__(256, 1)
tiled_linear(const T* __restrict__ x_MK, const uint4* __restrict__ codes, const S* __restrict__ scales,
             const float* __restrict__ bias_N, OUT* __restrict__ out_MN, int M, int N, int K, int k_tiles, int span,
             int accumulate) {
  using L = Stage<FORMAT, ROWS, WN>;
  constexpr int kStep = kSteps<FORMAT>, COLS = 4;
  FLM_DYN_SMEM(uint4, stages);
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, wn = warp % WN, wm = warp / WN;
  int row_tile0 = blockIdx.x * L::kRowTiles, row_tile = row_tile0 + wn * ROWS, row_tiles = (N + 15) / 16;
  int m0 = blockIdx.y * L::kColumns, spans = k_tiles / span, groups = GROUP ? k_tiles * kStep / max(GROUP, 1) : 0;

  Slice<T, S, GROUP, ROWS, COLS> slice;
  int base = min(row_tile, row_tiles - 1);
#pragma unroll
  for (int r = 0; r < ROWS; ++r)  // rows behind the last are computed from the last, and not stored
    slice.row_stride[r] = (min(row_tile + r, row_tiles - 1) - base) * groups * 16;
  if (GROUP) {
    slice.scales = scales + (size_t)base * groups * 16 + g;
    slice.load_scales(true);
  }
  float total[ROWS][COLS][4] = {};
  int slice_number = 0, slice_end = spans / 8 * span, count = (k_tiles + L::kTiles - 1) / L::kTiles;
  auto fetch = [&](int i) {
    if (i < count)
      load_stage<T, FORMAT, ROWS, WN>(stages + i % L::kStages * L::kPieces, codes, x_MK, row_tile0, row_tiles,
                                      i * L::kTiles, k_tiles, m0, M, K);
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < L::kStages - 1; ++i) fetch(i);
  for (int number = 0; number < count; ++number) {
    cp_async_wait<L::kStages - 2>();
    __syncthreads();  // this stage is whole, and all are done with the one before, which is filled anew
    fetch(number + L::kStages - 1);
    const uint4* stage = stages + number % L::kStages * L::kPieces;
    const uint2* x = reinterpret_cast<const uint2*>(stage + L::kCodes + (wm * 32 + g) * 8) + (t & 1);
#pragma unroll
    for (int i = 0; i < L::kTiles; ++i) {
      int tile = number * L::kTiles + i;
      if (tile >= k_tiles) break;
      uint4 now[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) now[r] = stage[((wn * ROWS + r) * L::kTiles + i) * 32 + lane];
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
        uint2 part[COLS];
#pragma unroll
        for (int c = 0; c < COLS; ++c) part[c] = x[64 * 2 * c + 2 * ((2 * (i * kStep + s) + (t >> 1)) ^ (g & 3) * 2)];
        slice.template step<FORMAT>(now, part, s);
        if (ends_group<GROUP, kStep>(tile, s)) slice.end_group(tile * kStep + s + 1 < k_tiles * kStep);
      }
      while (tile + 1 >= slice_end && slice_number < 8) {
        ++slice_number;  // where slices are empty, several end here
        slice_end = spans * (slice_number + 1) / 8 * span;
        slice.end_slice(total);
      }
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int c = 0; c < COLS; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int n = (row_tile + r) * 16 + g + 8 * (e >> 1), m = m0 + wm * 32 + 8 * c + 2 * t + (e & 1);
        if (n >= N || m >= M) continue;
        float v = total[r][c][e];
        write_out(out_MN[(size_t)m * N + n], bias_N ? v + bias_N[n] : v, accumulate);
      }
}

}  // namespace flm
