// slice.h - what an output of a product is made of, whatever the batch and whichever kernel makes it.
//
// K is cut in 8 slices, on borders of groups; a slice is the sum, group by group, of
// scale * (codes times x) + offset * (sum of x); the slices are added in order.
#pragma once
#include "weights.h"

namespace flm {

// Whether step s of a tile is the last of its group; where it can be told from s alone, it is.
template <int GROUP, int STEPS>
__device__ __forceinline__ bool ends_group(int tile, int s) {
  if (!GROUP) return false;
  if (GROUP <= STEPS) return (s + 1) % max(GROUP, 1) == 0;
  return s == STEPS - 1 && (tile + 1) % (GROUP / STEPS > 0 ? GROUP / STEPS : 1) == 0;
}

// One warp's sums. GROUP: steps of 16 inputs that share a scale, 0 for weights without scales.
template <class T, class S, int GROUP, int ROWS, int COLS>
struct Slice {
  float acc[ROWS][COLS][4] = {}, dot[ROWS][COLS][4] = {}, sum[COLS][4] = {};
  S next[ROWS][2];   // scales of the group to come: loaded a whole group ahead
  const S* scales;   // of this lane's row g in that group
  int row_stride[ROWS];

  __device__ __forceinline__ void load_scales(bool more) {
    if (!more) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      next[r][0] = scales[row_stride[r]];
      next[r][1] = scales[row_stride[r] + 8];
    }
    scales += 16;
  }
  __device__ __forceinline__ void end_group(bool more) {
    S now[ROWS][2];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) now[r][0] = next[r][0], now[r][1] = next[r][1];
    load_scales(more);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int c = 0; c < COLS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& a = acc[r][c][i];
          a = fmaf(scale_of(now[r][i >> 1]), dot[r][c][i], a);
          if (kHasOffset<S>) a = fmaf(offset_of(now[r][i >> 1]), sum[c][i & 1], a);
          dot[r][c][i] = 0.f;
        }
#pragma unroll
    for (int c = 0; c < COLS; ++c) sum[c][0] = sum[c][1] = sum[c][2] = sum[c][3] = 0.f;
  }
  // tile: the weights of one tile, x: this lane's part of x in its step s.
  template <int FORMAT>
  __device__ __forceinline__ void step(const uint4 (&tile)[ROWS], const uint2 (&x)[COLS], int s) {
    uint32_t a[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const uint32_t words[4] = {tile[r].x, tile[r].y, tile[r].z, tile[r].w};
      Fragment<T, FORMAT>::get(a[r], words + s * kWords<FORMAT>);
    }
#pragma unroll
    for (int c = 0; c < COLS; ++c) {
      const uint32_t b[2] = {x[c].x, x[c].y}, ones[4] = {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>};
#pragma unroll
      for (int r = 0; r < ROWS; ++r) mma<T>(GROUP ? dot[r][c] : acc[r][c], a[r], b);
      if (kHasOffset<S>) mma<T>(sum[c], ones, b);  // every row of it is the sum of x
    }
  }
};

}  // namespace flm
