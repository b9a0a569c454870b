// Rotary embedding of q and k, keys and values stored in the paged cache, q put where attention reads it.
//
// One warp is one head of one token: of H query, J key and J value heads, in the order of qkv's columns. Column d < R
// pairs with d + R; columns from 2R on stay. Cache layout [blocks, J, block size, D]; slot = block * size + offset.
// KV: the cache's type. signed char: codes with one float scale for each token and head, max |v| / 127.
#include "reduce.h"

namespace flm {

constexpr int kWarps = 8;
constexpr int kColumns = 8;  // of 32, so D <= 256

template <class KV>
__device__ __forceinline__ void store_head(KV* to, float*, const float (&v)[kColumns], int lane, int D) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    if (lane + 32 * j < D) to[lane + 32 * j] = narrow<KV>(v[j]);
}
template <>
__device__ __forceinline__ void store_head<signed char>(signed char* to, float* scale, const float (&v)[kColumns],
                                                        int lane, int D) {
  float most = 0.f;
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    if (lane + 32 * j < D) most = fmaxf(most, fabsf(v[j]));
  most = warp_max(most);
  float inverse = most > 0.f ? 127.f / most : 0.f;
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    if (lane + 32 * j < D) to[lane + 32 * j] = (signed char)__float2int_rn(v[j] * inverse);
  if (lane == 0) *scale = most / 127.f;
}

template <class T, class KV>
__global__ void __launch_bounds__(32 * kWarps)
rope_kv_write(const T* __restrict__ qkv_TC, const int* __restrict__ positions_T, const int* __restrict__ slots_T,
              const float* __restrict__ cos_PR, const float* __restrict__ sin_PR, KV* __restrict__ k_cache,
              KV* __restrict__ v_cache, float* __restrict__ k_scales, float* __restrict__ v_scales,
              T* __restrict__ q_out_THD, int H, int J, int D, int R, int block_size) {
  int t = blockIdx.x, lane = threadIdx.x & 31, head = blockIdx.y * kWarps + (threadIdx.x >> 5);
  if (head >= H + 2 * J) return;
  int slot = slots_T[t];
  if (head >= H && slot < 0) return;
  const T* x = qkv_TC + ((size_t)t * (H + 2 * J) + head) * D;
  size_t at = (size_t)positions_T[t] * R;
  float v[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    int d = lane + 32 * j;
    if (d >= D) continue;
    v[j] = widen(x[d]);
    if (head >= H + J || d >= 2 * R) continue;  // values and the columns behind the rotary ones stay
    if (d < R) v[j] = v[j] * cos_PR[at + d] - widen(x[d + R]) * sin_PR[at + d];
    else v[j] = v[j] * cos_PR[at + d - R] + widen(x[d - R]) * sin_PR[at + d - R];
  }
  if (head < H) return store_head<T>(q_out_THD + ((size_t)t * H + head) * D, nullptr, v, lane, D);
  bool key = head < H + J;
  int j = head - H - (key ? 0 : J);
  size_t place = ((size_t)(slot / block_size) * J + j) * block_size + slot % block_size;
  store_head<KV>((key ? k_cache : v_cache) + place * D, (key ? k_scales : v_scales) + place, v, lane, D);
}

}  // namespace flm
