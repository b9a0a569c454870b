// One token a row of logits, as reference_sampling.py specifies: penalties, temperature, min_p, top_k, top_p, a draw.
//
// A block is a row. Probabilities become whole numbers of 2^-40, so that sums are exact in any order: a row's token is a
// pure function of its logits and parameters. Borders of top_k and top_p come from four passes over histograms of the
// logits' bits, 8 at a time; nothing is sorted. adjusted: [S][V] floats for rows that have penalties.
#include "reduce.h"

namespace flm {

constexpr int kThreads = 1024, kWarpCount = kThreads / 32, kBins = 256;

__device__ __forceinline__ uint32_t key_of(float v) {  // ordered like the floats; -0 counts as 0
  uint32_t bits = __float_as_uint(v + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

template <class F>
__device__ __forceinline__ uint64_t block_reduce(uint64_t v, uint64_t* scratch, F combine) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = combine(v, __shfl_xor_sync(kAll, v, o));
  __syncthreads();  // nobody still reads the scratch of the reduction before
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();
  v = scratch[0];
  for (int w = 1; w < kWarpCount; ++w) v = combine(v, scratch[w]);
  return v;
}
__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
__device__ __forceinline__ uint64_t added(uint64_t a, uint64_t b) { return a + b; }

// Which tokens are left: key > border, or key == border up to the id `bound`; and a weight of at least `least`.
struct Row {
  const float* x;
  int V;
  float top, inverse;  // of the temperature
  float least = 0.f;
  uint32_t border = 0;
  int bound = 0x7fffffff;
  __device__ __forceinline__ float weight(float v) const { return __expf((v - top) * inverse); }
  __device__ __forceinline__ uint64_t mass(float v) const { return (uint64_t)(weight(v) * 1099511627776.f); }
  __device__ __forceinline__ bool has(int i, float v) const {
    uint32_t key = key_of(v);
    return (key > border || (key == border && i <= bound)) && weight(v) >= least;
  }
};
struct Shared {
  uint64_t scratch[kWarpCount];
  uint64_t mass[kBins];
  unsigned count[kBins];
  uint64_t taken, each;
  unsigned digit, found;
};

// The id at which the running sum of amount(id), in the order of ids, passes `target`.
template <class F>
__device__ int locate(int V, uint64_t target, Shared& shared, F amount) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int length = (V + kThreads - 1) / kThreads * 32, first = warp * length, end = min(V, first + length);
  uint64_t sum = 0, before = 0;
  for (int i = first + lane; i < end; i += 32) sum += amount(i);
#pragma unroll
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(kAll, sum, o);
  __syncthreads();
  if (lane == 0) shared.scratch[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += shared.scratch[w];
  if (before <= target && target < before + sum) {  // one warp
    for (int i = first; i < end; i += 32) {
      uint64_t v = i + lane < end ? amount(i + lane) : 0, upto = v;
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
        uint64_t left = __shfl_up_sync(kAll, upto, o);
        if (lane >= o) upto += left;
      }
      unsigned passed = __ballot_sync(kAll, before + upto > target);
      if (passed) {
        if (lane == 0) shared.found = i + __ffs(passed) - 1;
        break;
      }
      before += __shfl_sync(kAll, upto, 31);
    }
  }
  __syncthreads();
  return shared.found;
}

// Of histogram bins, from the highest down, the first where the amount so far reaches `wanted`. One warp.
__device__ __forceinline__ void find_digit(bool by_mass, uint64_t wanted, Shared& shared) {
  int lane = threadIdx.x & 31;
  uint64_t sum = 0, taken = shared.taken;
  for (int b = 0; b < 8; ++b) sum += by_mass ? shared.mass[255 - 8 * lane - b] : shared.count[255 - 8 * lane - b];
  uint64_t upto = sum;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    uint64_t left = __shfl_up_sync(kAll, upto, o);
    if (lane >= o) upto += left;
  }
  unsigned reached = __ballot_sync(kAll, taken + upto >= wanted);
  if (lane != __ffs(reached) - 1) return;
  taken += upto - sum;
  for (int b = 255 - 8 * lane;; --b) {
    uint64_t amount = by_mass ? shared.mass[b] : shared.count[b];
    if (taken + amount >= wanted) {
      shared.digit = b, shared.taken = taken, shared.each = by_mass ? shared.mass[b] / shared.count[b] : 1;
      return;
    }
    taken += amount;
  }
}

// Keeps the most likely tokens of the row: `wanted` of them, or as few as have a mass of `wanted` (at most all there is).
__device__ void keep_top(Row& row, bool by_mass, uint64_t wanted, Shared& shared) {
  uint32_t prefix = 0;
  __syncthreads();
  if (threadIdx.x == 0) shared.taken = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    if (threadIdx.x < kBins) shared.count[threadIdx.x] = 0, shared.mass[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < row.V; i += kThreads) {
      float v = row.x[i];
      uint32_t key = key_of(v);
      if ((shift < 24 && key >> (shift + 8) != prefix) || !row.has(i, v)) continue;
      atomicAdd(&shared.count[key >> shift & 255], 1u);
      if (by_mass) atomicAdd(&shared.mass[key >> shift & 255], row.mass(v));
    }
    __syncthreads();
    if (threadIdx.x < 32) find_digit(by_mass, wanted, shared);
    __syncthreads();
    prefix = prefix << 8 | shared.digit;
  }
  uint64_t left = wanted - shared.taken, each = shared.each ? shared.each : 1;
  uint64_t ties = (left + each - 1) / each;
  Row all = row;
  int bound = row.bound;
  if (ties < shared.count[prefix & 255])
    bound = locate(row.V, ties - 1, shared, [&](int i) {
      return (uint64_t)(key_of(all.x[i]) == prefix && all.has(i, all.x[i]));
    });
  else if (prefix != row.border)
    bound = 0x7fffffff;
  row.border = prefix, row.bound = bound;
}

// A weight below which none of the `count` most likely lies: so many threads have seen one at least as large.
__device__ uint32_t floor_key(uint32_t seen, int count, uint64_t* scratch) {
  uint32_t floor = 0;
  for (int bit = 31; bit >= 0; --bit) {
    uint32_t tried = floor | 1u << bit;
    if (block_reduce(seen >= tried, scratch, added) >= count) floor = tried;
  }
  return floor;
}

// Philox4x32-10 with key = seed, counter = position (philox.py): 53 random bits.
__device__ __forceinline__ uint64_t random53(uint64_t seed, uint64_t position) {
  uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    uint32_t high0 = __umulhi(0xD2511F53u, c0), high1 = __umulhi(0xCD9E8D57u, c2);
    uint32_t low0 = 0xD2511F53u * c0, low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return (uint64_t)c0 << 21 | c1 >> 11;
}

// params: [S][8] floats: temperature, top_p, min_p, repetition, presence, frequency, -, -.
__global__ void __launch_bounds__(kThreads)
sample(const float* __restrict__ logits_SV, float* __restrict__ adjusted_SV, const float* __restrict__ params_S8,
       const int* __restrict__ top_k_S, const uint64_t* __restrict__ seed_S, const int64_t* __restrict__ position_S,
       const int* __restrict__ row_ptr, const int* __restrict__ token_ids, const uint8_t* __restrict__ in_prompt,
       const int* __restrict__ output_count, int* __restrict__ ids_S, float* __restrict__ logprobs_S,
       int* __restrict__ top_ids_SN, float* __restrict__ top_logprobs_SN, int V, int N) {
  FLM_SMEM(Shared, memory, 1);
  FLM_SMEM(float, sums, kWarpCount);
  Shared& shared = *memory;
  int s = blockIdx.x;
  const float *raw = logits_SV + (size_t)s * V, *params = params_S8 + 8 * s;
  auto best = [&](uint64_t v) { return block_reduce(v, shared.scratch, larger); };
  auto ranked = [](float v, int i) { return (uint64_t)key_of(v) << 32 | (0xffffffffu - i); };  // lowest id of equals
  auto id_of = [](uint64_t r) { return (int)(0xffffffffu - (uint32_t)r); };

  uint64_t mine = 0;
  for (int i = threadIdx.x; i < V; i += kThreads) mine = larger(mine, ranked(raw[i], i));
  int chosen = id_of(best(mine));
  float top = raw[chosen], sum = 0.f;
  for (int i = threadIdx.x; i < V; i += kThreads) sum += __expf(raw[i] - top);
  float total = top + logf(block_sum<kWarpCount>(sum, sums));  // log of the sum of exp
  uint64_t last = ~0ull;
  for (int n = 0; n < N; ++n) {
    uint64_t next = 0;
    for (int i = threadIdx.x; i < V; i += kThreads) {
      uint64_t r = ranked(raw[i], i);
      if (r < last) next = larger(next, r);
    }
    last = best(next);
    if (threadIdx.x == 0) {
      top_ids_SN[s * N + n] = id_of(last);
      top_logprobs_SN[s * N + n] = raw[id_of(last)] - total;
    }
  }

  Row row = {raw, V};
  int first = row_ptr[s], end = row_ptr[s + 1];
  float repetition = params[3], presence = params[4], frequency = params[5];
  if (first < end && (repetition != 1.f || presence != 0.f || frequency != 0.f)) {
    float* x = adjusted_SV + (size_t)s * V;
    for (int i = threadIdx.x; i < V; i += kThreads) x[i] = raw[i];
    __syncthreads();
    for (int i = first + threadIdx.x; i < end; i += kThreads) {
      float v = x[token_ids[i]];
      int count = output_count[i];
      if (in_prompt[i] || count > 0) v = v > 0.f ? __fdiv_rn(v, repetition) : __fmul_rn(v, repetition);
      v = __fsub_rn(v, __fmul_rn(frequency, (float)count));
      x[token_ids[i]] = __fsub_rn(v, count > 0 ? presence : 0.f);
    }
    __syncthreads();
    row.x = x;
    mine = 0;
    for (int i = threadIdx.x; i < V; i += kThreads) mine = larger(mine, ranked(x[i], i));
    chosen = id_of(best(mine));
  }
  float temperature = params[0], top_p = params[1];
  if (temperature > 0.f) {
    row.top = row.x[chosen];
    row.inverse = 1.f / temperature;
    row.least = fminf(params[2], 1.f);
    int top_k = top_k_S[s];
    if (top_k > 0 && top_k < V) {
      Row all = row;  // only tokens from here up are counted
      if (top_k <= kThreads && top_k * 4 < V) all.border = floor_key((uint32_t)(mine >> 32), top_k, shared.scratch);
      uint64_t left = 0;
      for (int i = threadIdx.x; i < V; i += kThreads) left += all.has(i, row.x[i]);
      left = block_reduce(left, shared.scratch, added);
      if (left > top_k) keep_top(all, false, top_k, shared);
      row = all;
    }
    uint64_t mass = 0;
    auto amount = [&](int i) { return row.has(i, row.x[i]) ? row.mass(row.x[i]) : 0; };
    for (int i = threadIdx.x; i < V; i += kThreads) mass += amount(i);
    mass = block_reduce(mass, shared.scratch, added);
    if (top_p < 1.f) {
      double wanted = ceil((double)top_p * (double)mass);
      if (top_k <= 0)  // what is lighter weighs less than 1 - top_p in all
        row.least = fmaxf(row.least, 0.999f * (1.f - top_p) * ((float)mass / 1099511627776.f) / V);
      keep_top(row, true, larger(1, (uint64_t)wanted), shared);
      mass = 0;
      for (int i = threadIdx.x; i < V; i += kThreads) mass += amount(i);
      mass = block_reduce(mass, shared.scratch, added);
    }
    uint64_t target = __umul64hi(random53(seed_S[s], (uint64_t)position_S[s]) << 11, mass);
    chosen = locate(V, target, shared, amount);
  }
  if (threadIdx.x == 0) {
    ids_S[s] = chosen;
    logprobs_S[s] = raw[chosen] - total;
  }
}

}  // namespace flm
