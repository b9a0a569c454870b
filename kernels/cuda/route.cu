// Each token's experts and their weights from the router's logits (expert_ops.py). A warp is one token; lane l has the
// experts l, l + 32, ... Sums are in an order that depends on the number of experts alone.
#include "reduce.h"

namespace flm {

constexpr int kTokens = 4;  // of a block

// A number that is larger where the float is; 0 is left for experts that may not be chosen.
__device__ __forceinline__ unsigned ordered(float v) {
  unsigned bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A group's worth: its best expert, or the sum of its two best.
__device__ __forceinline__ float worth_of(const float* choice, int size, bool pair_score) {
  float first = __uint_as_float(0xff800000u), second = first;  // minus infinity
  for (int i = 0; i < size; ++i) {
    float v = choice[i];
    if (v > first) second = first, first = v;
    else if (v > second) second = v;
  }
  return pair_score ? first + second : first;
}

// L: the logits' type; V: experts of a lane. counts: unsigned 64-bit, or none. sequence_T: -1 for padding, whose ids are -1.
template <class L, int V>
__global__ void __launch_bounds__(32 * kTokens)
route(const L* __restrict__ logits_TN, const float* __restrict__ bias_N, const int* __restrict__ sequence_T,
      int* __restrict__ ids_TK, float* __restrict__ weights_TK, uint64_t* counts_N, int T, int N, int K, int lead, int sigmoid,
      int groups, int kept, int pair_score, int normalize, float factor) {
  FLM_SMEM(float, all, 2 * kTokens * 32 * V);
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = blockIdx.x * kTokens + warp;
  if (t >= T) return;
  size_t out = (size_t)t * lead + lane;
  if (sequence_T && sequence_T[t] < 0) {
    if (lane < K) ids_TK[out] = -1, weights_TK[out] = 0.f;
    return;
  }
  float *scores = all + warp * 64 * V, *choices = scores + 32 * V, score[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    int n = lane + 32 * j;
    score[j] = n < N ? widen(logits_TN[(size_t)t * N + n]) : __uint_as_float(0xff800000u);
  }
  if (sigmoid) {
#pragma unroll
    for (int j = 0; j < V; ++j) score[j] = 1.f / (1.f + expf(-score[j]));
  } else {
    float most = score[0], sum = 0.f;
#pragma unroll
    for (int j = 1; j < V; ++j) most = fmaxf(most, score[j]);
    most = warp_max(most);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += score[j] = expf(score[j] - most);
    sum = warp_sum(sum);
#pragma unroll
    for (int j = 0; j < V; ++j) score[j] /= sum;
  }
  unsigned key[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    int n = lane + 32 * j;
    float choice = bias_N && n < N ? score[j] + bias_N[n] : score[j];
    scores[n] = score[j];
    choices[n] = choice;
    key[j] = n < N ? ordered(choice) : 0u;
  }
  __syncwarp();
  if (kept < groups) {  // lane g has group g
    int size = N / groups, better = 0;
    float worth = lane < groups ? worth_of(choices + lane * size, size, pair_score) : 0.f;
    for (int g = 0; g < groups; ++g) {
      float other = __shfl_sync(kAll, worth, g);
      better += other > worth || (other == worth && g < lane);
    }
    unsigned open = __ballot_sync(kAll, lane < groups && better < kept);
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (!(open >> (lane + 32 * j) / size & 1)) key[j] = 0u;
  }
  int mine = 0;
  for (int k = 0; k < K; ++k) {
    unsigned most = 0u, number = 0x7fffffffu;
#pragma unroll
    for (int j = 0; j < V; ++j) most = max(most, key[j]);
    most = __reduce_max_sync(kAll, most);
#pragma unroll
    for (int j = V - 1; j >= 0; --j)
      if (key[j] == most) number = lane + 32 * j;
    number = __reduce_min_sync(kAll, number);
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (lane + 32 * j == (int)number) key[j] = 0u;
    if (lane == k) mine = (int)number;
  }
  float weight = scores[mine], sum = 0.f;
  for (int k = 0; k < K; ++k) sum += __shfl_sync(kAll, weight, k);
  if (lane >= K) return;
  ids_TK[out] = mine;
  weights_TK[out] = (normalize ? weight / (sum + 1e-20f) : weight) * factor;
  if (counts_N) atomicAdd(counts_N + mine, (uint64_t)1);
}

}  // namespace flm
