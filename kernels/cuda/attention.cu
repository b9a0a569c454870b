// Paged attention on tensor cores, for decode and prefill alike: the softmax over a sequence's keys and values up to each
// token's own position.
//
// A warp has 16 rows: query heads of one key-value head, of one token or (without SPLIT) of as many as fit. It walks
// through the keys 16 at a time with a running maximum. Keys are cut in chunks of fixed length; a chunk's result is its
// maximum, its sum and its unscaled output, and chunks are merged in order. With SPLIT every warp takes other chunks, and
// combine() merges them; without, a warp takes all of its rows' chunks. The bits are the same either way, and do not
// depend on what else is in the warp: keys that a row does not see change nothing of it.
//
// Keys and values go from the cache to registers: lane 4 * g + t takes of key g the inputs 32 * b + 8 * t .. + 7 as those
// of two mma steps, and of values 2t, 2t + 1, 2t + 8, 2t + 9 the outputs 64 * c + 8 * g .. + 7 as columns g of 8 tiles.
#include "weights.h"

namespace flm {

constexpr int kRows = 16;
constexpr float kNone = -3e38f;  // the score of a key that is not seen

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
  __device__ __forceinline__ size_t slot(int key) const {
    return ((size_t)table[key / block_size] * J + j) * block_size + key % block_size;
  }
};

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAll, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAll, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(kAll, v, 1);
  return v + __shfl_xor_sync(kAll, v, 2);
}
// exp2(m - most), where nothing weighs nothing.
__device__ __forceinline__ float weight_of(float m, float most) { return m == kNone ? 0.f : exp2_approx(m - most); }
__device__ __forceinline__ float merged(float total, float w_total, float part, float w_part) {
  return __fmaf_rn(part, w_part, __fmul_rn(total, w_total));
}

// One warp's rows over one chunk. A lane has rows g and g + 8 (i = 0, 1), and of 8 * tile + e the outputs
// 64 * c + 16 * t + 8 * i + e, tile = c: acc[8 * c + e][2 * row + i].
template <class T, class KV, int DP>
struct Chunk {
  using Raw = typename Eight<T, KV>::Raw;
  static constexpr int kBlocks = DP / 32, kTiles = DP / 8;
  uint4 q[2][kBlocks];
  float most[2], sum[2], acc[kTiles][4];
  float slope[2] = {0.f, 0.f};  // of ALiBi, times log2(e)
  Raw k[2][kBlocks], v[4][DP / 64];

  __device__ __forceinline__ void load_q(const T* row0, const T* row1, int t, int D) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      int d = 32 * b + 8 * t;
      q[0][b] = q[1][b] = make_uint4(0u, 0u, 0u, 0u);
      if (row0 && d < D) q[0][b] = *reinterpret_cast<const uint4*>(row0 + d);
      if (row1 && d < D) q[1][b] = *reinterpret_cast<const uint4*>(row1 + d);
    }
  }
  __device__ __forceinline__ void load_k(const Cache<T, KV>& cache, int key, int g, int t) {
    const KV* base = cache.k + cache.slot(key) * cache.D;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        int d = 32 * b + 8 * t;
        k[n][b] = Raw{};
        if (d < cache.D) k[n][b] = *reinterpret_cast<const Raw*>(base + (size_t)(8 * n + g) * cache.D + d);
      }
  }
  __device__ __forceinline__ void load_v(const Cache<T, KV>& cache, int key, int last, int g, int t) {
    const KV* base = cache.v + cache.slot(key) * cache.D;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < DP / 64; ++c) {
        int d = 64 * c + 8 * g, row = 2 * t + (r & 1) + 8 * (r >> 1);
        v[r][c] = Raw{};  // what lies behind the sequence's end may be anything
        if (d < cache.D && key + row <= last) v[r][c] = *reinterpret_cast<const Raw*>(base + (size_t)row * cache.D + d);
      }
  }
  __device__ __forceinline__ void scores(float (&s)[2][4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint4 key = Eight<T, KV>::get(k[n][b]);
        const uint32_t a0[4] = {q[0][b].x, q[1][b].x, q[0][b].y, q[1][b].y}, b0[2] = {key.x, key.y};
        const uint32_t a1[4] = {q[0][b].z, q[1][b].z, q[0][b].w, q[1][b].w}, b1[2] = {key.z, key.w};
        mma<T>(s[n], a0, b0);
        mma<T>(s[n], a1, b1);
      }
    }
  }
  __device__ __forceinline__ void add_values(const uint32_t (&p)[4]) {
#pragma unroll
    for (int c = 0; c < DP / 64; ++c) {
      uint4 value[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) value[r] = Eight<T, KV>::get(v[r][c]);
      const uint32_t* words[4] = {&value[0].x, &value[1].x, &value[2].x, &value[3].x};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        unsigned pick = e & 1 ? 0x7632 : 0x5410;
        const uint32_t b[2] = {__byte_perm(words[0][e >> 1], words[1][e >> 1], pick),
                               __byte_perm(words[2][e >> 1], words[3][e >> 1], pick)};
        mma<T>(acc[8 * c + e], p, b);
      }
    }
  }
  // Keys first .. end - 1, of which a row sees those up to its own position; nothing is read behind `last`'s tile.
  __device__ __forceinline__ void run(const Cache<T, KV>& cache, const int (&position)[2], int first, int end, int last,
                                      float scale, int lane) {
    int g = lane >> 2, t = lane & 3;
    most[0] = most[1] = kNone;
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
    load_k(cache, first, g, t);
    for (int key = first; key < end; key += kRows) {
      load_v(cache, key, last, g, t);
      float s[2][4];
      scores(s);
      if (key + kRows < end) load_k(cache, key + kRows, g, t);
      uint32_t p[4];
      softmax_step(cache, position, key, scale, t, s, p);
      add_values(p);
    }
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
  }
  // Scores of 16 keys to weights in T, as the A operand of the product with the values.
  __device__ __forceinline__ void softmax_step(const Cache<T, KV>& cache, const int (&position)[2], int key, float scale,
                                               int t, float (&s)[2][4], uint32_t (&p)[4]) {
    size_t slot = sizeof(KV) == 1 ? cache.slot(key) + 2 * t : 0;
    float highest[2] = {most[0], most[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (sizeof(KV) == 1) s[n][i] *= cache.k_scales[slot + 8 * n + (i & 1)];
        int away = key + 8 * n + 2 * t + (i & 1) - position[i >> 1];
        s[n][i] = away <= 0 ? fmaf(slope[i >> 1], (float)away, s[n][i] * scale) : kNone;
        highest[i >> 1] = fmaxf(highest[i >> 1], s[n][i]);
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = quad_max(highest[r]);
      float keep = weight_of(most[r], highest[r]);
      most[r] = highest[r];
      sum[r] *= keep;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) acc[j][2 * r] *= keep, acc[j][2 * r + 1] *= keep;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = weight_of(s[n][i], most[i >> 1]);
        sum[i >> 1] += s[n][i];
        if (sizeof(KV) == 1) s[n][i] *= cache.v_scales[slot + 8 * n + (i & 1)];
      }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) p[2 * n + r] = pair<T>(s[n][2 * r], s[n][2 * r + 1]);
  }
};

// Which token, query head and position each of a warp's rows is. heads: query heads a key-value head.
struct Rows {
  int token, head;  // of row lane & 15; token -1: none
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

// parts: [T * H][chunks][DP] outputs and [T * H][chunks][2] maxima and sums, used with SPLIT only.
template <class T, class KV, int DP, bool SPLIT>
__global__ void __launch_bounds__(128, DP == 64 ? 3 : 2)
attention(const T* __restrict__ q_THD, const KV* __restrict__ k_cache, const KV* __restrict__ v_cache,
          const float* __restrict__ k_scales, const float* __restrict__ v_scales, const int* __restrict__ tables_SB,
          const int* __restrict__ sequence_T, const int* __restrict__ position_T, T* __restrict__ out_THD,
          float* __restrict__ parts, float* __restrict__ facts, const float* __restrict__ slopes_H, int tokens, int H,
          int J, int D, int B, int block_size, int chunk, int chunks, int tokens_per_tile, float scale) {
  FLM_DYN_SMEM(float, totals);  // without SPLIT: what each lane has merged so far
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, j = blockIdx.y, heads = H / J;
  float* total = totals + warp * kRows * DP + lane;
  Rows rows(SPLIT ? blockIdx.x : blockIdx.x * 4 + warp, j, heads, tokens, tokens_per_tile, lane);
  int sequence = rows.token < 0 ? -1 : sequence_T[rows.token];
  int row_number = rows.token < 0 ? -1 : rows.token * H + rows.head;
  int at[2] = {__shfl_sync(kAll, row_number, g), __shfl_sync(kAll, row_number, g + 8)};
  Chunk<T, KV, DP> part;
  part.load_q(at[0] < 0 ? nullptr : q_THD + (size_t)at[0] * D, at[1] < 0 ? nullptr : q_THD + (size_t)at[1] * D, t, D);
  if (slopes_H)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (at[r] >= 0) part.slope[r] = slopes_H[at[r] % H] * 1.4426950408889634f;
  float most[2] = {kNone, kNone}, sum[2] = {0.f, 0.f};
  if (!SPLIT)
#pragma unroll
    for (int e = 0; e < DP / 2; ++e) total[32 * e] = 0.f;

  unsigned todo = __ballot_sync(kAll, sequence >= 0) & 0xffffu;
  while (todo) {  // each sequence of which the warp has tokens
    int now = __shfl_sync(kAll, sequence, __ffs(todo) - 1), reach = -1;
    if (sequence == now) reach = position_T[rows.token];
    todo &= ~__ballot_sync(kAll, sequence == now);
    int position[2] = {__shfl_sync(kAll, reach, g), __shfl_sync(kAll, reach, g + 8)}, last = reach;
#pragma unroll
    for (int o = 8; o; o >>= 1) last = max(last, __shfl_xor_sync(kAll, last, o));
    Cache<T, KV> cache = {k_cache, v_cache, k_scales, v_scales, tables_SB + (size_t)now * B, J, j, block_size, D};
    for (int c = SPLIT ? blockIdx.z * 4 + warp : 0; c * chunk <= last; c += SPLIT ? gridDim.z * 4 : 1) {
      part.run(cache, position, c * chunk, min((c + 1) * chunk, last + 1), last, scale, lane);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (SPLIT) {
          if (at[r] < 0) continue;
          size_t place = (size_t)at[r] * chunks + c;
          if (t == 0) facts[2 * place] = part.most[r], facts[2 * place + 1] = part.sum[r];
#pragma unroll
          for (int e = 0; e < DP / 4; ++e)
            parts[place * DP + e / 16 * 64 + 16 * t + e % 16] = part.acc[e / 16 * 8 + e % 8][2 * r + e / 8 % 2];
          continue;
        }
        float highest = fmaxf(most[r], part.most[r]);
        float before = weight_of(most[r], highest), added = weight_of(part.most[r], highest);
        most[r] = highest;
        sum[r] = merged(sum[r], before, part.sum[r], added);
#pragma unroll
        for (int e = 0; e < DP / 4; ++e) {
          float& place = total[32 * (r * (DP / 4) + e)];
          place = merged(place, before, part.acc[e / 16 * 8 + e % 8][2 * r + e / 8 % 2], added);
        }
      }
    }
  }
  if (SPLIT) return;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int e = 0; e < DP / 4; ++e) {
      int d = e / 16 * 64 + 16 * t + e % 16;
      float value = sum[r] > 0.f ? total[32 * (r * (DP / 4) + e)] / sum[r] : 0.f;
      if (at[r] >= 0 && d < D) out_THD[(size_t)at[r] * D + d] = narrow<T>(value);
    }
}

// Merges the chunks that SPLIT left. Block: one token and head; thread: one output.
template <class T, int DP>
__global__ void __launch_bounds__(DP)
combine(const float* __restrict__ parts, const float* __restrict__ facts, const int* __restrict__ sequence_T,
        const int* __restrict__ position_T, T* __restrict__ out_THD, int H, int D, int chunk, int chunks) {
  int row = blockIdx.x, token = row / H, d = threadIdx.x;
  int count = sequence_T[token] < 0 ? 0 : position_T[token] / chunk + 1;
  float most = kNone, sum = 0.f, total = 0.f;
  for (int c = 0; c < count; ++c) {
    size_t place = (size_t)row * chunks + c;
    float highest = fmaxf(most, facts[2 * place]);
    float before = weight_of(most, highest), added = weight_of(facts[2 * place], highest);
    most = highest;
    sum = merged(sum, before, facts[2 * place + 1], added);
    total = merged(total, before, parts[place * DP + d], added);
  }
  if (d < D) out_THD[(size_t)row * D + d] = narrow<T>(sum > 0.f ? total / sum : 0.f);
}

}  // namespace flm
