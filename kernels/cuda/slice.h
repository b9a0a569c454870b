// slice.h - what an output of a product is made of, whatever the batch and whichever kernel makes it.
//
// K is cut in 8 slices, on borders of groups; a slice is the sum, group by group, of
// scale * (codes times x) + offset * (sum of x); the slices are added in order.
// For few rows of x each warp makes one slice, `multiply`, and they meet in shared memory; for many each makes all of them.
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
  // The slice is whole: add it to the sum of those before, and begin another.
  __device__ __forceinline__ void end_slice(float (&total)[ROWS][COLS][4]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int c = 0; c < COLS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[r][c][i] += acc[r][c][i], acc[r][c][i] = 0.f;
  }
  // The slice is whole: put it to [8 * COLS columns][16 * ROWS rows]. g, t: the lane's.
  __device__ __forceinline__ void put(float* to, int g, int t) const {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int c = 0; c < COLS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          to[(8 * c + 2 * t + (i & 1)) * 16 * ROWS + 16 * r + g + 8 * (i >> 1)] = acc[r][c][i];
  }
};

// The sum of 8 slices at place `at` of each; `count` places a slice.
__device__ __forceinline__ float sum_of_slices(const float* parts, int count, int at) {
  float v = 0.f;
#pragma unroll
  for (int w = 0; w < 8; ++w) v += parts[w * count + at];
  return v;
}

// out = v, or out += v.
template <class OUT>
__device__ __forceinline__ void write_out(OUT& out, float v, int accumulate) {
  out = narrow<OUT>(accumulate ? widen(out) + v : v);
}

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

// One slice: tiles `tile` to `last` of K inputs. Weights come through a ring of registers, DEPTH tiles of each row tile.
// code, rows: this lane's part of the first row tile's codes, and of the rows of x for the 8 columns each, at `tile`;
// code_stride: of the other row tiles.
template <int FORMAT, int DEPTH, class T, class S, int GROUP, int ROWS, int COLS>
__device__ __forceinline__ void multiply(Slice<T, S, GROUP, ROWS, COLS>& slice, const uint4* code,
                                         const int (&code_stride)[ROWS], const T* (&rows)[COLS], int tile, int last, int K,
                                         int t) {
  constexpr int kStep = kSteps<FORMAT>;
  constexpr int kSpan = GROUP > kStep ? GROUP / kStep : 1;  // tiles of a group, at whose borders slices begin
  int whole = min(last, K / (16 * kStep));                  // tiles that end before K
  uint4 ring[DEPTH][ROWS];
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
  for (int i = 0; i < DEPTH; ++i) load_tile(ring[i], i);
  load_next(0);
  while (tile < last) {
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
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
        if (ends_group<GROUP, kStep>(DEPTH % kSpan ? tile + i : i, s)) slice.end_group(s + 1 < kStep || tile + i + 1 < last);
      }
      load_tile(ring[i], i + DEPTH);
    }
    tile += DEPTH;
    code += DEPTH * 32;
#pragma unroll
    for (int c = 0; c < COLS; ++c) rows[c] += DEPTH * kStep * 16;
  }
}

}  // namespace flm
