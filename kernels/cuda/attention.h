// attention.h - what an output of attention is made of, whichever kernel makes it: see docs/cuda.md.
//
// A warp has 16 rows, query heads of one key-value head. Keys come 16 at a time in order, with a running maximum. They
// are cut in chunks of fixed length; a chunk's result is its maximum, its sum and its unscaled output, and chunks are
// merged in order. Arithmetic whose bits must not hang on what a compiler contracts is spelled with __f*_rn.
//
// Inputs of q and k are paired so: lane 4 * g + t has the inputs 32 * b + 8 * t .. + 7 as those of mma steps 2b and
// 2b + 1, in any kernel. Keys are mma's k indices of the product with the values as they lie.
#pragma once
#include "weights.h"

namespace flm {

constexpr int kRows = 16;
constexpr float kNone = -3e38f;  // the score of a key that is not seen
constexpr float kLog2e = 1.4426950408889634f;

// Eight neighbours of the cache as they lie there, and as T.
template <class T, class KV>
struct Eight {
  using Raw = uint4;
  static __device__ __forceinline__ uint4 get(const uint4& raw) { return raw; }
};
template <class T>
struct Eight<T, signed char> {
  using Raw = uint2;
  static __device__ __forceinline__ uint4 get(const uint2& raw) {
    const uint32_t words[2] = {raw.x ^ 0x80808080u, raw.y ^ 0x80808080u};
    uint32_t a[4];
    Fragment<T, kInt8>::get(a, words);
    return make_uint4(a[0], a[1], a[2], a[3]);
  }
};

template <class T, class KV>
struct Cache {  // of one sequence and key-value head
  const KV *k, *v;
  const float *k_scales, *v_scales;
  const int* table;
  int J, j, block_size, D;
};
// Goes through a sequence's slots, 16 keys a step: no division for each.
template <class C>
struct Walk {
  const C& cache;
  int block, offset;
  __device__ __forceinline__ Walk(const C& cache, int key)
      : cache(cache), block(key / cache.block_size), offset(key % cache.block_size) {}
  __device__ __forceinline__ size_t slot() const {
    return ((size_t)cache.table[block] * cache.J + cache.j) * cache.block_size + offset;
  }
  __device__ __forceinline__ void advance() {
    offset += 16;
    if (offset == cache.block_size) offset = 0, ++block;
  }
};

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAll, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAll, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v = __fadd_rn(v, __shfl_xor_sync(kAll, v, 1));
  return __fadd_rn(v, __shfl_xor_sync(kAll, v, 2));
}
// exp2(m - most), where nothing weighs nothing.
__device__ __forceinline__ float weight_of(float m, float most) {
  return m == kNone ? 0.f : exp2_approx(__fsub_rn(m, most));
}
// A part of no weight may be anything: a row's that belongs to another sequence than the keys.
__device__ __forceinline__ float merged(float total, float w_total, float part, float w_part) {
  return __fmaf_rn(w_part == 0.f ? 0.f : part, w_part, __fmul_rn(total, w_total));
}
// 0 of no keys; NaN where a score was.
__device__ __forceinline__ float normed(float total, float sum) {
  return sum == 0.f ? 0.f : __fmul_rn(total, __frcp_rn(sum));
}
// A weight times the scale of an int8 value, which may be anything where the key is not seen.
__device__ __forceinline__ float weighed(float weight, float scale) { return weight == 0.f ? weight : __fmul_rn(weight, scale); }
// A score in units of log2(e). away: the key's position less the query's.
__device__ __forceinline__ float score(float dot, float scale, float slope, int away) {
  return away <= 0 ? __fmaf_rn(slope, (float)away, __fmul_rn(dot, scale)) : kNone;
}
// Of 32 consecutive rows of 16 bytes a warp may read 8 at once where they lie in different banks: piece `at` of row
// `row` lies where piece at ^ turned(row) would, which suits reads of 2 rows' 4 neighbours and of 8 rows' one alike.
__device__ __forceinline__ int turned(int row) { return (row & 1) << 2 | (row >> 1 & 3); }

// A token that has its sequence for itself in this step. Tokens of one sequence are neighbours.
__device__ __forceinline__ bool alone(const int* sequence_T, int token, int tokens) {
  int s = sequence_T[token];
  return s >= 0 && (token == 0 || sequence_T[token - 1] != s) && (token + 1 == tokens || sequence_T[token + 1] != s);
}

// Which token and query head row lane & 15 of a tile is; token -1: none. heads: query heads a key-value head.
struct Rows {
  int token, head;
  __device__ __forceinline__ Rows(int tile, int j, int heads, int T, int tokens_per_tile, int lane) {
    int r = lane & 15, parts = (heads + kRows - 1) / kRows, within;
    if (heads > kRows) {
      token = tile / parts;
      within = tile % parts * kRows + r;
    } else {
      token = tile * tokens_per_tile + r / heads;
      within = r / heads < tokens_per_tile ? r % heads : heads;
    }
    head = j * heads + within;
    if (within >= heads || token >= T) token = -1;
  }
};

}  // namespace flm
