// The second product of a token's experts and the sum over its choices in one, for few tokens: the bits of grouped_linear.cu
// followed by combine_experts.cu. A block has 16 outputs of one token; of each choice's slices of K its warps take one each,
// another one of every choice, so that all have as much to do. Weights, x and scales come through one ring of registers.
#include "slice.h"

namespace flm {

constexpr int kMostChoices = 16, kRing = 8;

template <class T, int FORMAT, class S, int GROUP>
__global__ void __launch_bounds__(256)
expert_down(const T* __restrict__ act_PF, const uint4* __restrict__ codes, const S* __restrict__ scales,
            const int* __restrict__ ids_TK, const float* __restrict__ weights_TK, T* __restrict__ out_TE, int choices,
            int N, int K, int lead, int first, int count, int row_tiles, int k_tiles, int span, int accumulate) {
  constexpr int kStep = kSteps<FORMAT>;
  constexpr int kGroups = GROUP && GROUP < kStep ? kStep / (GROUP ? GROUP : 1) : 1;  // of a tile
  FLM_SMEM(float, parts, kMostChoices * 8 * 16);  // [choice][slice][row]
  FLM_SMEM(float, sums, kMostChoices * 16);
  FLM_SMEM(int, chosen, kMostChoices);
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  size_t row0 = (size_t)blockIdx.y * choices;
  for (int i = threadIdx.x; i < choices * 8 * 16; i += 256) parts[i] = 0.f;  // slices may be empty
  if (threadIdx.x < choices) {
    int e = ids_TK[row0 + threadIdx.x] - first;
    chosen[threadIdx.x] = e >= 0 && e < count ? e : -1;
  }
  __syncthreads();
  int spans = k_tiles / span, groups = GROUP ? k_tiles * kStep / max(GROUP, 1) : 0;

  struct Place {  // a tile of choice k
    int k, tile, last;
  };
  auto begin = [&](Place& p) {  // at choice p.k, or the next that has a tile for this warp
    for (; p.k < choices; ++p.k) {
      int s = (warp + p.k) & 7;
      p.tile = spans * s / 8 * span, p.last = spans * (s + 1) / 8 * span;
      if (chosen[p.k] >= 0 && p.tile < p.last) return;
    }
  };
  auto advance = [&](Place& p) {
    if (++p.tile < p.last) return;
    ++p.k;
    begin(p);
  };
  uint4 code[kRing][1];
  uint2 x[kRing][kStep];
  S scale[kRing][kGroups][2];
  auto load = [&](int i, const Place& p) {
    if (p.k >= choices) return;
    size_t row = (size_t)chosen[p.k] * row_tiles + blockIdx.x;
    code[i][0] = ldg_stream(codes + (row * k_tiles + p.tile) * 32 + lane);
#pragma unroll
    for (int s = 0; s < kStep; ++s) {
      int k = (p.tile * kStep + s) * 16 + 4 * t;
      x[i][s] = make_uint2(0u, 0u);
      if (g == 0 && k < K) x[i][s] = *reinterpret_cast<const uint2*>(act_PF + (row0 + p.k) * lead + k);
    }
    if (GROUP)
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        size_t group = row * groups + p.tile * kStep / max(GROUP, 1) + j;
        scale[i][j][0] = scales[group * 16 + g];
        scale[i][j][1] = scales[group * 16 + g + 8];
      }
  };
  Place next = {0, 0, 0}, now;
  begin(next);
  now = next;
#pragma unroll
  for (int i = 0; i < kRing; ++i) {
    load(i, next);
    if (next.k < choices) advance(next);
  }
  Slice<T, S, GROUP, 1, 1> slice;
  while (now.k < choices) {
#pragma unroll
    for (int i = 0; i < kRing; ++i) {
      if (now.k >= choices) break;
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
        const uint2 part[1] = {x[i][s]};
        slice.template step<FORMAT>(code[i], part, s);
        if (GROUP && (now.tile * kStep + s + 1) % max(GROUP, 1) == 0) {
          constexpr int kEach = kStep / kGroups;
          slice.next[0][0] = scale[i][s / kEach][0], slice.next[0][1] = scale[i][s / kEach][1];
          slice.end_group(false);
        }
      }
      if (now.tile + 1 == now.last) {
        float* to = parts + (now.k * 8 + ((warp + now.k) & 7)) * 16;
        if (t == 0) to[g] = slice.acc[0][0][0], to[g + 8] = slice.acc[0][0][2];
#pragma unroll
        for (int j = 0; j < 4; ++j) slice.acc[0][0][j] = 0.f;
      }
      advance(now);
      load(i, next);
      if (next.k < choices) advance(next);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < choices * 16; i += 256) sums[i] = sum_of_slices(parts + i / 16 * 8 * 16, 16, i % 16);
  __syncthreads();
  int n = blockIdx.x * 16 + threadIdx.x;
  if (threadIdx.x >= 16 || n >= N) return;
  T& out = out_TE[(size_t)blockIdx.y * N + n];
  float v = accumulate ? widen(out) : 0.f;
  for (int k = 0; k < choices; ++k)
    if (chosen[k] >= 0) v = __fmaf_rn(weights_TK[row0 + k], sums[k * 16 + threadIdx.x], v);
  out = narrow<T>(v);
}

}  // namespace flm
