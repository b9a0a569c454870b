// Attention over a paged cache of latents (latent_ops.py), on tensor cores, for decode and prefill alike.
//
// A block has 16 rows, heads of one token, and walks through the keys 32 at a time with a running maximum. A cache entry is a
// key and, its first L values, the value too: it is read once. Of a tile's scores warp w makes those of keys 8w .. 8w + 7, of
// the outputs the w-th quarter. Keys are cut in chunks, at places that depend on the position alone; a chunk's result is its
// maximum, its sum and its unscaled output, and chunks are merged in order. With SPLIT every block takes other chunks, and
// combine_latents() merges them; without, a block takes all of its token's. The bits are the same either way.
#include "attention.h"

namespace flm {

constexpr int kTile = 32, kWarps = 4;
constexpr int kShortest = 64, kSameLength = 32;  // keys of the first chunks; so many chunks, then twice as long

__device__ __forceinline__ int chunk_start(int c) {
  int level = c / kSameLength;
  return kShortest * (kSameLength * ((1 << level) - 1) + c % kSameLength * (1 << level));
}
__device__ __forceinline__ int chunks_of(int keys) {
  int level = 0;
  while (keys > kShortest * kSameLength * ((2 << level) - 1)) ++level;
  int within = keys - kShortest * kSameLength * ((1 << level) - 1);
  return kSameLength * level + (within + (kShortest << level) - 1) / (kShortest << level);
}

// lead: elements from row to row of shared memory, such that 8 rows' 16 bytes lie in different banks.
template <class T, int LP, bool SPLIT>
__global__ void __launch_bounds__(32 * kWarps, 2)
latent_attention(const T* __restrict__ q_latent_THL, const T* __restrict__ q_rope_THD, const T* __restrict__ cache,
                 const int* __restrict__ tables_SB, const int* __restrict__ sequence_T,
                 const int* __restrict__ position_T, T* __restrict__ out_THL, float* __restrict__ parts,
                 float* __restrict__ facts, int H, int L, int D, int B, int block_size, int chunks, int lead,
                 float scale) {
  constexpr int kTiles = LP / 8 / kWarps;  // of 8 outputs, of a warp
  FLM_DYN_SMEM(T, memory);
  T *q = memory, *stages = q + 16 * lead, *weights = stages + 2 * kTile * lead;
  FLM_SMEM(float, shared_most, kWarps * 16);
  FLM_SMEM(float, shared_sum, kWarps * 16);
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int head_parts = (H + 15) / 16, token = blockIdx.x / head_parts, head0 = blockIdx.x % head_parts * 16;
  int sequence = sequence_T[token], W = L + D, pieces = W / 8, depth = (W + 31) / 32;
  size_t row0 = (size_t)token * H + head0;
  if (sequence < 0) {
    if (!SPLIT)
      for (int i = threadIdx.x; i < min(16, H - head0) * L; i += 32 * kWarps) out_THL[row0 * L + i] = narrow<T>(0.f);
    return;
  }
  int keys = position_T[token] + 1, count = chunks_of(keys);
  if (SPLIT && blockIdx.y >= count) return;
  const int* table = tables_SB + (size_t)sequence * B;

  // Queries, and zeros wherever no copy will write.
  for (int i = threadIdx.x; i < 16 * lead / 8; i += 32 * kWarps) {
    int r = i / (lead / 8), column = i % (lead / 8) * 8;
    uint4 v = make_uint4(0u, 0u, 0u, 0u);
    if (head0 + r < H && column < L) v = *reinterpret_cast<const uint4*>(q_latent_THL + (row0 + r) * L + column);
    else if (head0 + r < H && column < W) v = *reinterpret_cast<const uint4*>(q_rope_THD + (row0 + r) * D + column - L);
    *reinterpret_cast<uint4*>(q + r * lead + column) = v;
  }
  int rest = lead / 8 - pieces;
  for (int i = threadIdx.x; i < 2 * kTile * rest; i += 32 * kWarps)
    *reinterpret_cast<uint4*>(stages + i / rest * lead + W + i % rest * 8) = make_uint4(0u, 0u, 0u, 0u);

  int row_step = 32 * kWarps / pieces, piece_step = 32 * kWarps % pieces;
  auto copy_tile = [&](int stage, int key, int end) {
    auto slot_of = [&](int k) {  // of 16 keys' first: a block's size is a multiple of 16
      k = min(k, end - 1) / 16 * 16;
      return (size_t)table[k / block_size] * block_size + k % block_size;
    };
    size_t slot = slot_of(key), slot16 = slot_of(key + 16);
    for (int r = threadIdx.x / pieces, p = threadIdx.x % pieces; r < kTile; r += row_step, p += piece_step) {
      if (p >= pieces) p -= pieces, ++r;
      if (r >= kTile) break;
      bool inside = key + r < end;
      cp_async16(stages + (stage * kTile + r) * lead + 8 * p,
                 cache + (inside ? ((r < 16 ? slot : slot16) + r % 16) * W + 8 * p : 0), inside);
    }
    cp_async_commit();
  };

  float acc[kTiles][4], total[SPLIT ? 1 : kTiles][4] = {}, total_most[2] = {kNone, kNone}, total_sum[2] = {0.f, 0.f};
  for (int c = SPLIT ? blockIdx.y : 0; c < count; c += SPLIT ? gridDim.y : 1) {
    int first = chunk_start(c), end = min(chunk_start(c + 1), keys);
    float most[2] = {kNone, kNone}, sum[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
    copy_tile(0, first, end);  // nobody reads the stages since the chunk before was summed up
    for (int key = first, stage = 0; key < end; key += kTile, stage ^= 1) {
      cp_async_wait<0>();
      __syncthreads();
      if (key + kTile < end) copy_tile(stage ^ 1, key + kTile, end);
      const T* tile = stages + stage * kTile * lead;

      float s[2][4] = {};
      for (int d = 0; d < depth; ++d) {
        uint32_t a[2][4], b[4];
        ldmatrix_x4(a[0], q + lane % 16 * lead + 32 * d + lane / 16 * 8);
        ldmatrix_x4(a[1], q + lane % 16 * lead + 32 * d + 16 + lane / 16 * 8);
        ldmatrix_x4(b, tile + (8 * warp + lane % 8) * lead + 32 * d + lane / 8 * 8);
        const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        mma<T>(s[0], a[0], b0);
        mma<T>(s[1], a[1], b1);
      }
      float high[2] = {kNone, kNone};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bool seen = key + 8 * warp + 2 * t + (i & 1) < end;
        s[0][i] = seen ? __fmul_rn(__fadd_rn(s[0][i], s[1][i]), scale) : kNone;
        high[i >> 1] = fmaxf(high[i >> 1], s[0][i]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        high[r] = quad_max(high[r]);
        if (t == 0) shared_most[warp * 16 + g + 8 * r] = high[r];
      }
      __syncthreads();
      float keep[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float now = most[r];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) now = fmaxf(now, shared_most[w * 16 + g + 8 * r]);
        keep[r] = weight_of(most[r], now);
        most[r] = now;
        float p0 = weight_of(s[0][2 * r], now), p1 = weight_of(s[0][2 * r + 1], now);
        sum[r] = __fmaf_rn(sum[r], keep[r], __fadd_rn(p0, p1));
        *reinterpret_cast<uint32_t*>(weights + (g + 8 * r) * 40 + 8 * warp + 2 * t) = pair<T>(p0, p1);
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][i] = __fmul_rn(acc[j][i], keep[i >> 1]);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        uint32_t a[4];
        ldmatrix_x4(a, weights + lane % 16 * 40 + 16 * k + lane / 16 * 8);
        const T* value = tile + (16 * k + lane % 16) * lead + warp * (LP / kWarps) + lane / 16 * 8;
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, value + 8 * j);
          const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
          mma<T>(acc[j], a, b0);
          mma<T>(acc[j + 1], a, b1);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float mine = quad_sum(sum[r]);
      if (t == 0) shared_sum[warp * 16 + g + 8 * r] = mine;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float of_chunk = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) of_chunk = __fadd_rn(of_chunk, shared_sum[w * 16 + g + 8 * r]);
      if (SPLIT) {
        int head = head0 + g + 8 * r;
        if (head >= H) continue;
        size_t place = ((size_t)token * H + head) * chunks + c;
        if (warp == 0 && t == 0) facts[2 * place] = most[r], facts[2 * place + 1] = of_chunk;
        float* to = parts + place * LP + warp * (LP / kWarps) + 2 * t;
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          *reinterpret_cast<float2*>(to + 8 * j) = make_float2(acc[j][2 * r], acc[j][2 * r + 1]);
        continue;
      }
      float highest = fmaxf(total_most[r], most[r]);
      float before = weight_of(total_most[r], highest), added = weight_of(most[r], highest);
      total_most[r] = highest;
      total_sum[r] = merged(total_sum[r], before, of_chunk, added);
#pragma unroll
      for (int j = 0; j < (SPLIT ? 0 : kTiles); ++j)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) total[j][i] = merged(total[j][i], before, acc[j][i], added);
    }
  }
  if (SPLIT) return;
#pragma unroll
  for (int j = 0; j < (SPLIT ? 0 : kTiles); ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int head = head0 + g + 8 * (i >> 1), l = warp * (LP / kWarps) + 8 * j + 2 * t + (i & 1);
      if (head < H && l < L) out_THL[((size_t)token * H + head) * L + l] = narrow<T>(total[j][i] / total_sum[i >> 1]);
    }
}

// Merges the chunks that SPLIT left. Block: one token and head; thread: one output.
template <class T, int LP>
__global__ void __launch_bounds__(LP)
combine_latents(const float* __restrict__ parts, const float* __restrict__ facts, const int* __restrict__ sequence_T,
                const int* __restrict__ position_T, T* __restrict__ out_THL, int H, int L, int chunks) {
  int row = blockIdx.x, token = row / H, l = threadIdx.x;
  int count = sequence_T[token] < 0 ? 0 : chunks_of(position_T[token] + 1);
  float most = kNone, sum = 0.f, total = 0.f;
#pragma unroll 8
  for (int c = 0; c < count; ++c) {
    size_t place = (size_t)row * chunks + c;
    float highest = fmaxf(most, facts[2 * place]);
    float before = weight_of(most, highest), added = weight_of(facts[2 * place], highest);
    most = highest;
    sum = merged(sum, before, facts[2 * place + 1], added);
    total = merged(total, before, parts[place * LP + l], added);
  }
  if (l < L) out_THL[(size_t)row * L + l] = narrow<T>(sum == 0.f ? 0.f : total / sum);
}

}  // namespace flm
