// Products of rows of x with one of several matrices each, for few rows a matrix: linear.cu with an index.
//
// What is multiplied is "pairs": pair p takes row p / divide of x and gives row p of out. A block has 16 * ROWS outputs of one
// matrix for all of its pairs, 8 at a time. The pairs of matrix e are
//   with `ids`: those p with ids[p] - first = e, which the block looks for itself: block y is the y-th matrix or, where there
//     are fewer pairs than matrices, the matrix of pair y, unless an earlier pair has the same;
//   with `starts` and `order` (expert_plan.cu): order[starts[e]] .. order[starts[e + 1] - 1];
//   with neither: e, e + count, e + 2 * count ...: matrix e is that of head e.
// A pair's bits do not depend on the others, and are those of tiled_grouped.cu. GATED: see gated.h.
#include "gated.h"

namespace flm {

constexpr int kMostTokens = 64;  // of which a block looks for its pairs

// By one warp: pairs of one matrix to found[2..], their number to found[1], the matrix to found[0].
__device__ __forceinline__ void find_pairs(int* found, const int* __restrict__ ids, int pairs, int first, int count,
                                           int slot, int lane) {
  bool by_pair = pairs < count;
  int e = by_pair ? ids[slot] - first : slot, n = 0;
  if (e >= 0 && e < count)
    for (int base = 0; base < pairs; base += 32) {
      int p = base + lane;
      bool hit = p < pairs && ids[p] - first == e;
      if (by_pair && __any_sync(kAll, hit && p < slot)) break;  // an earlier block makes these
      unsigned hits = __ballot_sync(kAll, hit);
      int place = n + __popc(hits & ((1u << lane) - 1u));
      if (hit && place < kMostTokens) found[2 + place] = p;
      n += __popc(hits);
    }
  if (lane == 0) found[0] = e, found[1] = min(n, kMostTokens);
}

template <class T, class OUT, int FORMAT, class S, int GROUP, int ROWS, bool GATED>
__global__ void __launch_bounds__(256, GROUP == 0 || GROUP > 2 ? 2 : 1)
grouped_linear(const T* __restrict__ x, const uint4* __restrict__ codes, const S* __restrict__ scales,
               OUT* __restrict__ out, const int* __restrict__ ids, const int* __restrict__ starts,
               const int* __restrict__ order, int pairs, int count, int first, int divide, int N, int K, int x_lead,
               int out_lead, int row_tiles, int k_tiles, int span) {
  constexpr int kStep = kSteps<FORMAT>, kOuts = (GATED ? 8 : 16) * ROWS, kPlaces = 8 * 16 * ROWS;
  FLM_SMEM(float, parts, 8 * kPlaces);  // [warp][column][row]
  FLM_SMEM(int, found, 2 + kMostTokens);
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, row_tile = blockIdx.x * ROWS;
  int e = blockIdx.y, rows = pairs / count;
  const int* list = nullptr;
  if (order) {
    rows = starts[e + 1] - starts[e], list = order + starts[e];
  } else if (ids) {
    if (warp == 0) find_pairs(found, ids, pairs, first, count, blockIdx.y, lane);
    __syncthreads();
    e = found[0], rows = found[1], list = found + 2;
  }
  if (rows == 0) return;
  int spans = k_tiles / span, from = spans * warp / 8 * span, last = spans * (warp + 1) / 8 * span;
  int groups = GROUP ? k_tiles * kStep / max(GROUP, 1) : 0, base = min(row_tile, row_tiles - 1);
  const uint4* code = codes + (((size_t)e * row_tiles + base) * k_tiles + from) * 32 + lane;
  int code_stride[ROWS], row_stride[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {  // rows behind the last are computed from the last, and not stored
    int row = min(row_tile + r, row_tiles - 1);
    code_stride[r] = (row - base) * k_tiles * 32;
    row_stride[r] = (row - base) * groups * 16;
  }

  for (int done = 0; done < rows; done += 8) {
    Slice<T, S, GROUP, ROWS, 1> slice;
    if (GROUP) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) slice.row_stride[r] = row_stride[r];
      size_t row = (size_t)e * row_tiles + base;
      slice.scales = scales + (row * groups + from * kStep / max(GROUP, 1)) * 16 + g;
      slice.load_scales(from < last);
    }
    int column = min(done + g, rows - 1);  // columns behind the last are computed from the last, and not stored
    int pair = list ? list[column] : column * count + e;
    const T* row_x[1] = {x + (size_t)(pair / divide) * x_lead + from * kStep * 16 + 4 * t};
    multiply<FORMAT, (ROWS > 2 ? 2 : 4)>(slice, code, code_stride, row_x, from, last, K, t);
    slice.put(parts + warp * kPlaces, g, t);
    __syncthreads();
    auto sum_of = [&](int at) { return sum_of_slices(parts, kPlaces, at); };
    for (int o = threadIdx.x; o < min(8, rows - done) * kOuts; o += 256) {
      int c = o / kOuts, r = o % kOuts, n = blockIdx.x * kOuts + r;
      if (n >= N) continue;
      int p = list ? list[done + c] : (done + c) * count + e;
      int at = c * 16 * ROWS + (GATED ? r / 8 * 16 + r % 8 : r);
      float v = GATED ? silu_times(sum_of(at), sum_of(at + 8)) : sum_of(at);
      out[(size_t)p * out_lead + n] = narrow<OUT>(v);
    }
    __syncthreads();
  }
}

}  // namespace flm
