// Paged attention for prompts, on tensor cores, with attention.cu's bits: a block's warps have 16 rows each (heads of one
// key-value head, of as many tokens as fit) and share keys and values through shared memory, kTile at a time.
//
// Of heads wider than 128 two warps make one half of the outputs each, and queries stay in shared memory. Rows of 16 bytes
// lie turned (attention.h), so that neither 8 keys' pieces nor a matrix of values meets one bank twice. int8 caches are
// copied as they lie and widened by the thread that copied them, once for all warps.
#include "attention.h"

namespace flm {

constexpr int kWarps = 8;

template <class T, class KV, int DP>
struct Layout {
  static constexpr bool kWide = DP > 128, kBytes = sizeof(KV) == 1;
  static constexpr int kHalves = kWide ? 2 : 1, kOut = DP / kHalves, kBlocks = DP / 32, kGroups = kWarps / kHalves;
  static constexpr int kTile = DP > 64 ? 32 : 64, kSub = kTile / 16;
  static constexpr int kLead = (DP + 63) / 64 * 8;      // pieces of 16 bytes from row to row
  static constexpr int kStage = 2 * kTile * kLead;      // pieces of a tile's keys and values
  static constexpr int kStages = kBytes ? 1 : kWide ? 2 : DP == 64 ? 3 : 4;
  static constexpr int kPieces = kTile * DP / 8;        // of keys, and of values, without padding
  static constexpr int kShare = (kPieces + 32 * kWarps - 1) / (32 * kWarps);
  static constexpr int kRaw = kBytes ? 2 * 2 * kPieces : 0;  // 8 bytes each: two tiles of int8
};

// The first slots of a tile's 16s; 0 for those from `end` on.
template <class T, class KV, int DP>
__device__ __forceinline__ void slots_of(unsigned (&to)[Layout<T, KV, DP>::kSub], Walk<Cache<T, KV>>& walk, int key, int end) {
#pragma unroll
  for (int u = 0; u < Layout<T, KV, DP>::kSub; ++u) {
    to[u] = key + 16 * u < end ? walk.slot() : 0;
    walk.advance();
  }
}
// Copies a tile's keys and values to `stage`, zeros where there are none.
template <class T, class KV, int DP>
__device__ __forceinline__ void copy_tile(void* stage, const Cache<T, KV>& cache, Walk<Cache<T, KV>>& walk, int key,
                                          int end) {
  using L = Layout<T, KV, DP>;
  unsigned slots[L::kSub];
  slots_of<T, KV, DP>(slots, walk, key, end);
#pragma unroll
  for (int i = 0; i < L::kShare; ++i) {
    int number = threadIdx.x + 32 * kWarps * i, row = number / (DP / 8), piece = number % (DP / 8);
    if (number >= L::kPieces) break;
    bool inside = key + row < end && 8 * piece < cache.D;
    unsigned low = row < 16 ? slots[0] : slots[1], high = row < 48 ? slots[L::kSub - 2] : slots[L::kSub - 1];
    size_t from = inside ? (size_t)((row < 32 ? low : high) + row % 16) * cache.D + 8 * piece : 0;
    if (L::kBytes) {
      cp_async8(static_cast<uint2*>(stage) + number, cache.k + from, inside);
      cp_async8(static_cast<uint2*>(stage) + L::kPieces + number, cache.v + from, inside);
    } else {
      int to = row * L::kLead + (piece ^ turned(row));
      cp_async16(static_cast<uint4*>(stage) + to, cache.k + from, inside);
      cp_async16(static_cast<uint4*>(stage) + L::kStage / 2 + to, cache.v + from, inside);
    }
  }
}
// What this thread has copied of an int8 tile, as T.
template <class T, class KV, int DP>
__device__ __forceinline__ void widen_tile(uint4* stage, const uint2* raw) {
  using L = Layout<T, KV, DP>;
#pragma unroll
  for (int i = 0; i < L::kShare; ++i) {
    int number = threadIdx.x + 32 * kWarps * i, row = number / (DP / 8), piece = number % (DP / 8);
    if (number >= L::kPieces) break;
    int to = row * L::kLead + (piece ^ turned(row));
    stage[to] = Eight<T, signed char>::get(raw[number]);
    stage[L::kStage / 2 + to] = Eight<T, signed char>::get(raw[L::kPieces + number]);
  }
}

// One warp's rows: lane 4 * g + t has rows g and g + 8 and the outputs 8 * n + 2 * t, + 1, as acc[n][2 * row + i].
template <class T, class KV, int DP>
struct Work {
  using L = Layout<T, KV, DP>;
  static constexpr int kHeld = L::kWide ? 1 : L::kBlocks, kTiles = L::kOut / 8;
  uint4 q[2][kHeld];
  const uint4* q_rows;  // of wide heads: the warp's 16 rows in shared memory
  float acc[kTiles][4], total[kTiles][4] = {};
  float most[2], sum[2], all_most[2] = {kNone, kNone}, all_sum[2] = {0.f, 0.f}, slope[2] = {0.f, 0.f};
  int position[2], lowest;  // lowest: of all rows that take part

  __device__ __forceinline__ void start_chunk() {
    most[0] = most[1] = kNone;
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.f;
  }
  __device__ __forceinline__ void end_chunk() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = quad_sum(sum[r]);
      float highest = fmaxf(all_most[r], most[r]);
      float before = weight_of(all_most[r], highest), added = weight_of(most[r], highest);
      all_most[r] = highest;
      all_sum[r] = merged(all_sum[r], before, sum[r], added);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) total[n][i] = merged(total[n][i], before, acc[n][i], added);
    }
  }
  __device__ __forceinline__ void scores(float (&s)[L::kSub][2][4], const uint4* keys, int g, int t) {
#pragma unroll
    for (int u = 0; u < L::kSub; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i) s[u][i >> 2][i & 3] = 0.f;
#pragma unroll
    for (int b = 0; b < L::kBlocks; ++b) {
      int piece = (4 * b + t) ^ turned(g);
      uint4 q0 = L::kWide ? q_rows[g * L::kLead + piece] : q[0][L::kWide ? 0 : b];
      uint4 q1 = L::kWide ? q_rows[(g + 8) * L::kLead + piece] : q[1][L::kWide ? 0 : b];
      const uint32_t a0[4] = {q0.x, q1.x, q0.y, q1.y}, a1[4] = {q0.z, q1.z, q0.w, q1.w};
#pragma unroll
      for (int n = 0; n < 2 * L::kSub; ++n) {
        uint4 key = keys[(8 * n + g) * L::kLead + piece];
        const uint32_t b0[2] = {key.x, key.y}, b1[2] = {key.z, key.w};
        mma<T>(s[n >> 1][n & 1], a0, b0);
        mma<T>(s[n >> 1][n & 1], a1, b1);
      }
    }
  }
  // The scales of this lane's 4 keys of 16: [n][i & 1].
  __device__ __forceinline__ void scales_of(float (&to)[2][2], const float* scales, unsigned slot, bool inside, int t) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float2 v = inside ? *reinterpret_cast<const float2*>(scales + slot + 2 * t + 8 * n) : make_float2(0.f, 0.f);
      to[n][0] = v.x, to[n][1] = v.y;
    }
  }
  __device__ __forceinline__ void tile(const Cache<T, KV>& cache, const uint4* keys, int out_piece,
                                       int key, int end, float scale, bool sloped, int lane) {
    int g = lane >> 2, t = lane & 3;
    float s[L::kSub][2][4], scales[2][2];
    unsigned slots[L::kSub];
    if (L::kBytes) {
      Walk<Cache<T, KV>> walk(cache, key);
      slots_of<T, KV, DP>(slots, walk, key, end);
    }
    scores(s, keys, g, t);
    if (L::kBytes)
#pragma unroll
      for (int u = 0; u < L::kSub; ++u) {
        scales_of(scales, cache.k_scales, slots[u], key + 16 * u < end, t);
#pragma unroll
        for (int i = 0; i < 8; ++i) s[u][i >> 2][i & 3] = __fmul_rn(s[u][i >> 2][i & 3], scales[i >> 2][i & 1]);
      }
    if (!sloped && key + L::kTile - 1 <= lowest) {  // every row sees every key
#pragma unroll
      for (int i = 0; i < 8 * L::kSub; ++i) s[i >> 3][i >> 2 & 1][i & 3] = __fmul_rn(s[i >> 3][i >> 2 & 1][i & 3], scale);
    } else {
#pragma unroll
      for (int i = 0; i < 8 * L::kSub; ++i) {
        float& v = s[i >> 3][i >> 2 & 1][i & 3];
        v = score(v, scale, slope[i >> 1 & 1], key + (i >> 2) * 8 + 2 * t + (i & 1) - position[i >> 1 & 1]);
      }
    }
    float highest[L::kSub][2], keep[L::kSub][2];
    bool moved = false;
#pragma unroll
    for (int u = 0; u < L::kSub; ++u)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        highest[u][r] = quad_max(fmaxf(fmaxf(s[u][0][2 * r], s[u][0][2 * r + 1]), fmaxf(s[u][1][2 * r], s[u][1][2 * r + 1])));
#pragma unroll
    for (int u = 0; u < L::kSub; ++u)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        highest[u][r] = fmaxf(most[r], highest[u][r]);
        keep[u][r] = weight_of(most[r], highest[u][r]);
        moved |= keep[u][r] != 1.f;
        most[r] = highest[u][r];
      }
    moved = __any_sync(kAll, moved);
    const uint4* values = keys + L::kStage / 2 + ((lane & 7) + (lane & 8)) * L::kLead;
#pragma unroll
    for (int u = 0; u < L::kSub; ++u) {
      if (moved)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[n][i] = __fmul_rn(acc[n][i], keep[u][i >> 1]);
      uint32_t p[4];
      if (L::kBytes) scales_of(scales, cache.v_scales, slots[u], key + 16 * u < end, t);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sum[r] = __fmul_rn(sum[r], keep[u][r]);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float w[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            w[i] = weight_of(s[u][n][2 * r + i], highest[u][r]);
            sum[r] = __fadd_rn(sum[r], w[i]);
            if (L::kBytes) w[i] = weighed(w[i], scales[n][i]);
          }
          p[2 * n + r] = pair<T>(w[0], w[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t v[4];
        ldmatrix_x4_trans(v, values + 16 * u * L::kLead + ((out_piece + n + (lane >> 4)) ^ turned(lane)));
        const uint32_t b0[2] = {v[0], v[1]}, b1[2] = {v[2], v[3]};
        mma<T>(acc[n], p, b0);
        mma<T>(acc[n + 1], p, b1);
      }
    }
  }
};

// Block: kGroups * 16 rows, the last ones first, which have most to do. skip_alone: tokens that have their sequence for
// themselves are left to attention().
template <class T, class KV, int DP>
__global__ void __launch_bounds__(32 * kWarps, 1)
prefill_attention(const T* __restrict__ q_THD, const KV* __restrict__ k_cache, const KV* __restrict__ v_cache,
                  const float* __restrict__ k_scales, const float* __restrict__ v_scales,
                  const int* __restrict__ tables_SB, const int* __restrict__ sequence_T,
                  const int* __restrict__ position_T, T* __restrict__ out_THD, const float* __restrict__ slopes_H,
                  int tokens, int H, int J, int D, int B, int block_size, int chunk, int skip_alone,
                  int tokens_per_tile, float scale) {
  using L = Layout<T, KV, DP>;
  constexpr int kBlockRows = L::kGroups * kRows;
  FLM_DYN_SMEM(uint4, memory);  // tiles, raw tiles of int8, queries of wide heads
  FLM_SMEM(int, row_of, kBlockRows);
  FLM_SMEM(int, sequence_of, kBlockRows);
  FLM_SMEM(int, position_of, kBlockRows);
  FLM_SMEM(int, first_of, kBlockRows);
  uint2* raw = reinterpret_cast<uint2*>(memory + L::kStages * L::kStage);
  uint4* queries = memory + L::kStages * L::kStage + L::kRaw / 2;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, j = blockIdx.x, heads = H / J;
  int group = warp / L::kHalves, out0 = warp % L::kHalves * L::kOut, row0 = group * kRows;

  if (threadIdx.x < kBlockRows) {
    int r = threadIdx.x, s = -1, position = -1;
    Rows of((gridDim.y - 1 - blockIdx.y) * L::kGroups + r / kRows, j, heads, tokens, tokens_per_tile, r);
    if (of.token >= 0 && skip_alone && alone(sequence_T, of.token, tokens)) of.token = -1;
    if (of.token >= 0) s = sequence_T[of.token], position = position_T[of.token];
    row_of[r] = of.token < 0 ? -1 : of.token * H + of.head;
    sequence_of[r] = s;
    position_of[r] = position;
  }
  __syncthreads();
  if (threadIdx.x < kBlockRows) {
    bool first = sequence_of[threadIdx.x] >= 0;
    for (int r = 0; r < threadIdx.x; ++r) first &= sequence_of[r] != sequence_of[threadIdx.x];
    first_of[threadIdx.x] = first;
  }
  Work<T, KV, DP> work;
  if (L::kWide) {
    work.q_rows = queries + row0 * L::kLead;
    for (int i = threadIdx.x; i < kBlockRows * DP / 8; i += 32 * kWarps) {
      int r = i / (DP / 8), piece = i % (DP / 8);
      uint4 v = make_uint4(0u, 0u, 0u, 0u);
      if (row_of[r] >= 0 && 8 * piece < D) v = *reinterpret_cast<const uint4*>(q_THD + (size_t)row_of[r] * D + 8 * piece);
      queries[r * L::kLead + (piece ^ turned(r))] = v;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2 * work.kHeld; ++i) {
      int d = 32 * (i >> 1) + 8 * t, row = row_of[row0 + g + 8 * (i & 1)];
      uint4 v = make_uint4(0u, 0u, 0u, 0u);
      if (row >= 0 && d < D) v = *reinterpret_cast<const uint4*>(q_THD + (size_t)row * D + d);
      work.q[i & 1][i >> 1] = v;
    }
  }
  if (slopes_H)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int row = row_of[row0 + g + 8 * r];
      if (row >= 0) work.slope[r] = __fmul_rn(slopes_H[row % H], kLog2e);
    }
  __syncthreads();

  for (int number = 0; number < kBlockRows; ++number) {  // each sequence of which the block has rows
    if (!first_of[number]) continue;
    int now = sequence_of[number], last = -1, reach = -1, lowest = 1 << 30;
#pragma unroll
    for (int r = lane; r < kBlockRows; r += 32)
      if (sequence_of[r] == now) last = max(last, position_of[r]);
    int mine = row0 + (lane & 15);
    if (sequence_of[mine] == now) reach = position_of[mine];
    if (row_of[mine] >= 0) lowest = reach;
#pragma unroll
    for (int o = 16; o; o >>= 1) {
      last = max(last, __shfl_xor_sync(kAll, last, o));
      reach = max(reach, __shfl_xor_sync(kAll, reach, o));
      lowest = min(lowest, __shfl_xor_sync(kAll, lowest, o));
    }
    work.lowest = lowest;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int row = row0 + g + 8 * r;
      work.position[r] = sequence_of[row] == now ? position_of[row] : row_of[row] < 0 ? 1 << 30 : -1;
    }
    Cache<T, KV> cache = {k_cache, v_cache, k_scales, v_scales, tables_SB + (size_t)now * B, J, j, block_size, D};

    Walk<Cache<T, KV>> ahead(cache, 0);
    int tiles = last / L::kTile + 1;
    auto fetch = [&](int i) {
      void* to = L::kBytes ? (void*)(raw + i % 2 * 2 * L::kPieces) : (void*)(memory + i % L::kStages * L::kStage);
      if (i < tiles) copy_tile<T, KV, DP>(to, cache, ahead, i * L::kTile, min((i + 1) * L::kTile, last + 1));
      cp_async_commit();
    };
    constexpr int kAhead = L::kBytes ? 1 : L::kStages - 1;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(i);
    for (int i = 0; i < tiles; ++i) {
      if (L::kBytes) fetch(i + 1);
      cp_async_wait<L::kBytes ? 1 : kAhead - 1>();
      __syncthreads();  // all are done with the tile before this one; without int8, this one is whole
      if (L::kBytes) {
        widen_tile<T, KV, DP>(memory, raw + i % 2 * 2 * L::kPieces);
        __syncthreads();
      } else {
        fetch(i + kAhead);
      }
      int key = i * L::kTile;
      if (key > reach) continue;
      if (key % chunk == 0) work.start_chunk();
      work.tile(cache, memory + i % L::kStages * L::kStage, out0 / 8, key, min(key + L::kTile, last + 1), scale,
                slopes_H != nullptr, lane);
      if ((key + L::kTile) % chunk == 0 || key + L::kTile > reach) work.end_chunk();
    }
    cp_async_wait<0>();
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int row = row_of[row0 + g + 8 * r];  // again: registers are scarce
#pragma unroll
    for (int n = 0; n < work.kTiles; ++n) {
      int d = out0 + 8 * n + 2 * t;
      float sum = work.all_sum[r];
      uint32_t both = pair<T>(normed(work.total[n][2 * r], sum), normed(work.total[n][2 * r + 1], sum));
      if (row >= 0 && d < D) *reinterpret_cast<uint32_t*>(out_THD + (size_t)row * D + d) = both;
    }
  }
}

}  // namespace flm
