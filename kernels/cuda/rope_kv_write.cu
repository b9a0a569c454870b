// Rotary embedding of q and k, keys and values stored in the paged cache, q put where attention reads it.
//
// Before, heads may be normed (RMSNorm over their D columns); after, q may be scaled by a factor of its position.
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
  float most = 0.f, wrong = 0.f;  // NaN where a value is not finite: codes would hide that
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    if (lane + 32 * j < D) most = fmaxf(most, fabsf(v[j])), wrong += v[j] - v[j];
  most = warp_max(most);
  wrong = warp_sum(wrong);
  float inverse = most > 0.f ? 127.f / most : 0.f;
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    if (lane + 32 * j < D) to[lane + 32 * j] = (signed char)__float2int_rn(v[j] * inverse);
  if (lane == 0) *scale = most / 127.f + wrong;
}

template <class T>
__device__ __forceinline__ float inverse_norm(const T* x, int lane, int D, float eps) {
  float sum = 0.f;
  for (int d = lane; d < D; d += 32) sum += widen(x[d]) * widen(x[d]);
  return rsqrtf(warp_sum(sum) / D + eps);
}

template <class T, class KV>
__global__ void __launch_bounds__(32 * kWarps)
rope_kv_write(const T* __restrict__ qkv_TC, const int* __restrict__ positions_T, const int* __restrict__ slots_T,
              const float* __restrict__ cos_PR, const float* __restrict__ sin_PR, KV* __restrict__ k_cache,
              KV* __restrict__ v_cache, float* __restrict__ k_scales, float* __restrict__ v_scales,
              T* __restrict__ q_out_THD, const float* __restrict__ q_norm_D, const float* __restrict__ k_norm_D,
              const float* __restrict__ q_scale_P, int H, int J, int D, int R, int block_size, float eps) {
  int t = blockIdx.x, lane = threadIdx.x & 31, head = blockIdx.y * kWarps + (threadIdx.x >> 5);
  if (head >= H + 2 * J) return;
  int slot = slots_T[t];
  if (head >= H && slot < 0) return;
  const T* x = qkv_TC + ((size_t)t * (H + 2 * J) + head) * D;
  size_t at = (size_t)positions_T[t] * R;
  const float* norm = head < H ? q_norm_D : head < H + J ? k_norm_D : nullptr;
  float inverse = norm ? inverse_norm(x, lane, D, eps) : 1.f;
  float after = head < H && q_scale_P ? q_scale_P[positions_T[t]] : 1.f;
  auto input = [&](int d) { return norm ? widen(x[d]) * inverse * norm[d] : widen(x[d]); };
  float v[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    int d = lane + 32 * j;
    if (d >= D) continue;
    v[j] = input(d);
    if (head >= H + J) continue;
    if (d < R) v[j] = v[j] * cos_PR[at + d] - input(d + R) * sin_PR[at + d];
    else if (d < 2 * R) v[j] = v[j] * cos_PR[at + d - R] + input(d - R) * sin_PR[at + d - R];
    v[j] *= after;
  }
  if (head < H) return store_head<T>(q_out_THD + ((size_t)t * H + head) * D, nullptr, v, lane, D);
  bool key = head < H + J;
  int j = head - H - (key ? 0 : J);
  size_t place = ((size_t)(slot / block_size) * J + j) * block_size + slot % block_size;
  store_head<KV>((key ? k_cache : v_cache) + place * D, (key ? k_scales : v_scales) + place, v, lane, D);
}

}  // namespace flm
