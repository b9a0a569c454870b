// Paged attention for decode, on tensor cores: the softmax over a sequence's keys and values up to each token's own
// position. A warp takes some chunks of 16 heads of one token; combine() merges what warps leave. For prompts there is
// prefill_attention.cu, which gives the same bits.
//
// Keys and values go from the cache to registers: lane 4 * g + t takes of key g the inputs 32 * b + 8 * t .. + 7, and of
// values 2t, 2t + 1, 2t + 8, 2t + 9 the outputs 64 * c + 8 * g .. + 7 as columns g of 8 tiles. Of heads wider than 128
// two warps make one half of the outputs each.
#include "attention.h"

namespace flm {

// One warp's rows over one chunk. A lane has rows g and g + 8 (i = 0, 1), and of 8 * tile + e the outputs
// 64 * c + 16 * t + 8 * i + e, tile = c: acc[8 * c + e][2 * row + i].
template <class T, class KV, int DP>
struct Chunk {
  using Raw = typename Eight<T, KV>::Raw;
  static constexpr bool kWide = DP > 128;
  static constexpr int kBlocks = DP / 32, kOut = kWide ? DP / 2 : DP, kTiles = kOut / 8, kHeld = kWide ? 1 : kBlocks;
  uint4 q[2][kHeld];
  const uint4* q_rows;  // of wide heads: in shared memory, [16][DP / 8], turned
  float most[2], sum[2], acc[kTiles][4];
  float slope[2] = {0.f, 0.f};  // of ALiBi, times log2(e)
  int out0 = 0;                 // the first output
  Raw k[2][kBlocks], v[4][kOut / 64];

  __device__ __forceinline__ void load_q(const T* row0, const T* row1, int t, int D) {
#pragma unroll
    for (int b = 0; b < kHeld; ++b) {
      int d = 32 * b + 8 * t;
      q[0][b] = q[1][b] = make_uint4(0u, 0u, 0u, 0u);
      if (row0 && d < D) q[0][b] = *reinterpret_cast<const uint4*>(row0 + d);
      if (row1 && d < D) q[1][b] = *reinterpret_cast<const uint4*>(row1 + d);
    }
  }
  __device__ __forceinline__ void load_k(const Cache<T, KV>& cache, size_t slot, int g, int t) {
    const KV* base = cache.k + slot * cache.D;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        int d = 32 * b + 8 * t;
        k[n][b] = Raw{};
        if (d < cache.D) k[n][b] = *reinterpret_cast<const Raw*>(base + (size_t)(8 * n + g) * cache.D + d);
      }
  }
  __device__ __forceinline__ void load_v(const Cache<T, KV>& cache, size_t slot, int keys, int g, int t) {
    const KV* base = cache.v + slot * cache.D;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < kOut / 64; ++c) {
        int d = out0 + 64 * c + 8 * g, row = 2 * t + (r & 1) + 8 * (r >> 1);
        v[r][c] = Raw{};  // what lies behind the sequence's end may be anything
        if (d < cache.D && row < keys) v[r][c] = *reinterpret_cast<const Raw*>(base + (size_t)row * cache.D + d);
      }
  }
  __device__ __forceinline__ void scores(float (&s)[2][4], int g, int t) {
#pragma unroll
    for (int n = 0; n < 2; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      uint4 q0 = kWide ? q_rows[g * (DP / 8) + ((4 * b + t) ^ turned(g))] : q[0][kWide ? 0 : b];
      uint4 q1 = kWide ? q_rows[(g + 8) * (DP / 8) + ((4 * b + t) ^ turned(g))] : q[1][kWide ? 0 : b];
      const uint32_t a0[4] = {q0.x, q1.x, q0.y, q1.y}, a1[4] = {q0.z, q1.z, q0.w, q1.w};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint4 key = Eight<T, KV>::get(k[n][b]);
        const uint32_t b0[2] = {key.x, key.y}, b1[2] = {key.z, key.w};
        mma<T>(s[n], a0, b0);
        mma<T>(s[n], a1, b1);
      }
    }
  }
  __device__ __forceinline__ void add_values(const uint32_t (&p)[4]) {
#pragma unroll
    for (int c = 0; c < kOut / 64; ++c) {
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
    Walk<Cache<T, KV>> walk(cache, first);
    size_t slot = walk.slot(), next = slot;
    load_k(cache, slot, g, t);
    for (int key = first; key < end; key += kRows, slot = next) {
      load_v(cache, slot, last + 1 - key, g, t);
      float s[2][4];
      scores(s, g, t);
      walk.advance();
      if (key + kRows < end) next = walk.slot();
      if (!kWide && key + kRows < end) load_k(cache, next, g, t);
      uint32_t p[4];
      softmax_step(cache, position, key, slot + 2 * t, scale, t, s, p);
      if (kWide && key + kRows < end) load_k(cache, next, g, t);  // later: registers are scarce
      add_values(p);
    }
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
  }
  // Scores of 16 keys, of which slot has this lane's first, to weights in T, as the A operand of the product with the values.
  __device__ __forceinline__ void softmax_step(const Cache<T, KV>& cache, const int (&position)[2], int key, size_t slot,
                                               float scale, int t, float (&s)[2][4], uint32_t (&p)[4]) {
    float highest[2] = {most[0], most[1]}, keep[2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (sizeof(KV) == 1) s[n][i] = __fmul_rn(s[n][i], cache.k_scales[slot + 8 * n + (i & 1)]);
        s[n][i] = score(s[n][i], scale, slope[i >> 1], key + 8 * n + 2 * t + (i & 1) - position[i >> 1]);
        highest[i >> 1] = fmaxf(highest[i >> 1], s[n][i]);
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = quad_max(highest[r]);
      keep[r] = weight_of(most[r], highest[r]);
      most[r] = highest[r];
      sum[r] = __fmul_rn(sum[r], keep[r]);
    }
    if (__any_sync(kAll, keep[0] != 1.f || keep[1] != 1.f))
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][i] = __fmul_rn(acc[j][i], keep[i >> 1]);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = weight_of(s[n][i], most[i >> 1]);
        sum[i >> 1] = __fadd_rn(sum[i >> 1], s[n][i]);
        if (sizeof(KV) == 1) s[n][i] = weighed(s[n][i], cache.v_scales[slot + 8 * n + (i & 1)]);
      }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) p[2 * n + r] = pair<T>(s[n][2 * r], s[n][2 * r + 1]);
  }
};

// Block: 16 heads of one token, some chunks. parts: [rows][chunks][DP] outputs and facts: [rows][chunks][2] maxima and
// sums; row: token * H + head or, with alone_only, which leaves all tokens out that share a step with others of their
// sequence, sequence * H + head.
template <class T, class KV, int DP>
__global__ void __launch_bounds__(128, DP == 64 ? 3 : 2)
attention(const T* __restrict__ q_THD, const KV* __restrict__ k_cache, const KV* __restrict__ v_cache,
          const float* __restrict__ k_scales, const float* __restrict__ v_scales, const int* __restrict__ tables_SB,
          const int* __restrict__ sequence_T, const int* __restrict__ position_T, float* __restrict__ parts,
          float* __restrict__ facts, const float* __restrict__ slopes_H, int tokens, int H, int J, int D, int B,
          int block_size, int chunk, int chunks, int alone_only, float scale) {
  using Part = Chunk<T, KV, DP>;
  constexpr int kHalves = Part::kWide ? 2 : 1, kAtOnce = 4 / kHalves;  // chunks that the block works at
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, j = blockIdx.y, heads = H / J;
  int token = blockIdx.x / ((heads + kRows - 1) / kRows), sequence = sequence_T[token];
  if (sequence < 0 || (alone_only && !alone(sequence_T, token, tokens))) return;
  Rows rows(blockIdx.x, j, heads, tokens, 1, lane);
  int row_number = rows.token < 0 ? -1 : rows.token * H + rows.head;
  int at[2] = {__shfl_sync(kAll, row_number, g), __shfl_sync(kAll, row_number, g + 8)};
  Part part;
  if (Part::kWide) {
    FLM_SMEM(uint4, q_rows, Part::kWide ? kRows * DP / 8 : 1);
    for (int i = threadIdx.x; i < kRows * DP / 8; i += 128) {
      int r = i / (DP / 8), piece = i % (DP / 8);
      Rows of(blockIdx.x, j, heads, tokens, 1, r);
      uint4 v = make_uint4(0u, 0u, 0u, 0u);
      if (of.token >= 0 && 8 * piece < D)
        v = *reinterpret_cast<const uint4*>(q_THD + ((size_t)of.token * H + of.head) * D + 8 * piece);
      q_rows[r * (DP / 8) + (piece ^ turned(r))] = v;
    }
    part.q_rows = q_rows;
    part.out0 = warp % kHalves * Part::kOut;
    __syncthreads();
  } else {
    part.load_q(at[0] < 0 ? nullptr : q_THD + (size_t)at[0] * D, at[1] < 0 ? nullptr : q_THD + (size_t)at[1] * D, t, D);
  }
  if (slopes_H)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (at[r] >= 0) part.slope[r] = __fmul_rn(slopes_H[at[r] % H], kLog2e);

  int last = position_T[token], position[2] = {last, last};
  Cache<T, KV> cache = {k_cache, v_cache, k_scales, v_scales, tables_SB + (size_t)sequence * B, J, j, block_size, D};
  for (int c = blockIdx.z * kAtOnce + warp / kHalves; c * chunk <= last; c += gridDim.z * kAtOnce) {
    part.run(cache, position, c * chunk, min((c + 1) * chunk, last + 1), last, scale, lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (at[r] < 0) continue;
      size_t place = (size_t)((alone_only ? sequence : token) * H + at[r] % H) * chunks + c;
      if (t == 0 && part.out0 == 0) facts[2 * place] = part.most[r], facts[2 * place + 1] = part.sum[r];
#pragma unroll
      for (int e = 0; e < Part::kOut / 4; ++e)
        parts[place * DP + part.out0 + e / 16 * 64 + 16 * t + e % 16] = part.acc[e / 16 * 8 + e % 8][2 * r + e / 8 % 2];
    }
  }
}

// Merges the chunks. Block: some heads of one token; thread: one output. Tokens that attention() left out stay as they are.
template <class T, int DP>
__global__ void __launch_bounds__(DP)
combine(const float* __restrict__ parts, const float* __restrict__ facts, const int* __restrict__ sequence_T,
        const int* __restrict__ position_T, T* __restrict__ out_THD, int tokens, int H, int D, int chunk, int chunks,
        int alone_only, int heads_of_block) {
  int token = blockIdx.x, d = threadIdx.x, sequence = sequence_T[token];
  if (alone_only && !alone(sequence_T, token, tokens)) return;
  int count = sequence < 0 ? 0 : position_T[token] / chunk + 1;
  for (int h = blockIdx.y * heads_of_block; h < min(H, (int)(blockIdx.y + 1) * heads_of_block); ++h) {
    int row = (alone_only ? sequence : token) * H + h;
    float most = kNone, sum = 0.f, total = 0.f;
    for (int c = 0; c < count; ++c) {
      size_t place = (size_t)row * chunks + c;
      float highest = fmaxf(most, facts[2 * place]);
      float before = weight_of(most, highest), added = weight_of(facts[2 * place], highest);
      most = highest;
      sum = merged(sum, before, facts[2 * place + 1], added);
      total = merged(total, before, parts[place * DP + d], added);
    }
    if (d < D) out_THD[((size_t)token * H + h) * D + d] = narrow<T>(normed(total, sum));
  }
}

}  // namespace flm
