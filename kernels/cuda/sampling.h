// sampling.h - which tokens of a row of logits filters leave, and which of them a random number hits; for one block.
//
// Probabilities become whole numbers of 2^-40, so that sums are exact in any order: a row's token is a pure function of
// its logits and parameters. Borders of top_k and top_p come from four passes over histograms of the logits' bits, 8 at a
// time; nothing is sorted.
#pragma once
#include "reduce.h"

namespace flm {

constexpr int kThreads = 512, kWarpCount = kThreads / 32, kBins = 256;

__device__ __forceinline__ uint32_t key_of(float v) {  // ordered like the floats; -0 counts as 0, NaN is the largest
  uint32_t bits = v == v ? __float_as_uint(v + 0.f) : 0x7fffffffu;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
// Larger for the more likely, and of equals for the lowest id.
__device__ __forceinline__ uint64_t ranked(float v, int id) { return (uint64_t)key_of(v) << 32 | (0xffffffffu - id); }
__device__ __forceinline__ int id_of(uint64_t rank) { return (int)(0xffffffffu - (uint32_t)rank); }

template <class F>
__device__ __forceinline__ uint64_t block_reduce(uint64_t v, uint64_t* scratch, F combine) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = combine(v, __shfl_xor_sync(kAll, v, o));
  __syncthreads();  // nobody still reads the scratch of the reduction before
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();
  v = scratch[0];
#pragma unroll
  for (int w = 1; w < kWarpCount; ++w) v = combine(v, scratch[w]);
  return v;
}
__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
__device__ __forceinline__ uint64_t added(uint64_t a, uint64_t b) { return a + b; }

// A row's weights relative to its largest logit. What weighs less than 2^-40 of that has no mass, and no filter counts it.
struct Weights {
  float top, inverse, least;  // inverse: of the temperature
  __device__ __forceinline__ float weight(float v) const { return __expf((v - top) * inverse); }
  // 0 for what min_p leaves out
  __device__ __forceinline__ uint64_t mass(float v) const {
    float w = weight(v);
    return w >= least ? (uint64_t)(w * 1099511627776.f) : 0;
  }
};
// Some tokens of a row in the order of their ids. Left are: key > border, or key == border up to the place `bound`.
struct Tokens {
  Weights weights;
  const float* x;
  int count;
  uint32_t border = 0;
  int bound = 0x7fffffff;
  __device__ __forceinline__ uint64_t mass(int i) const {
    float v = x[i];
    uint32_t key = key_of(v);
    return key > border || (key == border && i <= bound) ? weights.mass(v) : 0;
  }
};
struct Shared {
  uint64_t scratch[kWarpCount];
  uint64_t mass[kBins];
  unsigned count[kBins];
  uint64_t taken;
  unsigned digit, found;
};

// The place at which the running sum of amount(i) passes `target`.
template <class F>
__device__ __forceinline__ int locate(int count, uint64_t target, Shared& shared, F amount) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int length = (count + kThreads - 1) / kThreads * 32, first = warp * length, end = min(count, first + length);
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
      shared.digit = b, shared.taken = taken;
      return;
    }
    taken += amount;
  }
}

// Keeps the most likely tokens: `wanted` of them, or as few as have a mass of `wanted` (at most all there is).
__device__ __forceinline__ void keep_top(Tokens& tokens, bool by_mass, uint64_t wanted, Shared& shared) {
  uint32_t prefix = 0;
  __syncthreads();
  if (threadIdx.x == 0) shared.taken = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    if (threadIdx.x < kBins) shared.count[threadIdx.x] = 0, shared.mass[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < tokens.count; i += kThreads) {
      uint32_t key = key_of(tokens.x[i]);
      if (shift < 24 && key >> (shift + 8) != prefix) continue;
      uint64_t mass = tokens.mass(i);
      if (!mass) continue;
      atomicAdd(&shared.count[key >> shift & 255], 1u);
      if (by_mass) atomicAdd(&shared.mass[key >> shift & 255], mass);
    }
    __syncthreads();
    if (threadIdx.x < 32) find_digit(by_mass, wanted, shared);
    __syncthreads();
    prefix = prefix << 8 | shared.digit;
  }
  uint64_t left = wanted - shared.taken, each = by_mass ? tokens.weights.mass(value_of(prefix)) : 1;
  uint64_t ties = (uint64_t)__fdividef((float)left, (float)each);  // left / each, up: about, then to the unit
  while (ties * each < left) ++ties;
  while ((ties - 1) * each >= left) --ties;
  Tokens all = tokens;
  int bound = tokens.bound;
  if (ties < shared.count[prefix & 255])
    bound = locate(tokens.count, ties - 1, shared, [&](int i) {
      return (uint64_t)(key_of(all.x[i]) == prefix && all.mass(i) != 0);
    });
  else if (prefix != tokens.border)
    bound = 0x7fffffff;
  tokens.border = prefix, tokens.bound = bound;
}

// The least whole amount of mass that top_p of all of it reaches.
__device__ __forceinline__ uint64_t wanted_mass(float top_p, uint64_t mass) {
  return larger(1, (uint64_t)ceil((double)top_p * (double)mass));
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

}  // namespace flm
