// Sorts (token, choice) pairs by the expert chosen: one block.
//
// plan: starts [count + 1] of the experts' pairs, the number of units, units [most][2] of (expert, first of its pairs), pieces
// of at most kUnit pairs; then the pairs. Those of one expert come in any order: a pair's result does not depend on it.
#include "reduce.h"

namespace flm {

constexpr int kMostExperts = 1024, kUnit = 64;

__device__ __forceinline__ int sum_below(int v, int lane) {  // the sum of v over the lanes before
  int sum = v;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    int other = __shfl_up_sync(kAll, sum, o);
    if (lane >= o) sum += other;
  }
  return sum - v;
}

__global__ void __launch_bounds__(1024)
expert_plan(const int* __restrict__ ids, int pairs, int first, int count, int most_units, int* __restrict__ plan) {
  FLM_SMEM(int, numbers, kMostExperts);
  int *units = plan + count + 2, *order = units + 2 * most_units;
  for (int e = threadIdx.x; e < count; e += 1024) numbers[e] = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < pairs; p += 1024) {
    int e = ids[p] - first;
    if (e >= 0 && e < count) atomicAdd(numbers + e, 1);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    int lane = threadIdx.x, start = 0, unit = 0;
    for (int base = 0; base < count; base += 32) {
      int e = base + lane, n = e < count ? numbers[e] : 0, pieces = (n + kUnit - 1) / kUnit;
      int at = start + sum_below(n, lane), u = unit + sum_below(pieces, lane);
      if (e < count) plan[e] = numbers[e] = at;
      for (int i = 0; i < pieces; ++i) units[2 * (u + i)] = e, units[2 * (u + i) + 1] = kUnit * i;
      start = __shfl_sync(kAll, at + n, 31);
      unit = __shfl_sync(kAll, u + pieces, 31);
    }
    if (lane == 0) plan[count] = start, plan[count + 1] = unit;
  }
  __syncthreads();
  for (int p = threadIdx.x; p < pairs; p += 1024) {
    int e = ids[p] - first;
    if (e >= 0 && e < count) order[atomicAdd(numbers + e, 1)] = p;
  }
}

}  // namespace flm
