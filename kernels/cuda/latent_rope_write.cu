// Queries of latent attention split and rotated; latents normed (RMSNorm) and rotated keys put into the paged cache.
//
// A warp is one head's query of one token, or, behind the last, the token's latent and key. Column d < R pairs with d + R.
// Cache layout [slots][L + 2R]; slot -1: nothing stored.
#include "reduce.h"

namespace flm {

constexpr int kWarps = 8;

// Rotates 2R columns.
template <class T>
__device__ __forceinline__ void rotate(const T* x, T* out, const float* cos_R, const float* sin_R, int R, int lane) {
  for (int r = lane; r < R; r += 32) {
    float a = widen(x[r]), b = widen(x[r + R]);
    out[r] = narrow<T>(a * cos_R[r] - b * sin_R[r]);
    out[r + R] = narrow<T>(b * cos_R[r] + a * sin_R[r]);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps)
latent_rope_write(const T* __restrict__ q_THC, const T* __restrict__ kv_TC, const float* __restrict__ norm_L,
                  const int* __restrict__ positions_T, const int* __restrict__ slots_T,
                  const float* __restrict__ cos_PR, const float* __restrict__ sin_PR, T* __restrict__ cache,
                  T* __restrict__ q_plain_THN, T* __restrict__ q_rope_THD, int H, int N, int L, int R, float eps) {
  int t = blockIdx.x, lane = threadIdx.x & 31, head = blockIdx.y * kWarps + (threadIdx.x >> 5);
  if (head > H) return;
  const float *cos_R = cos_PR + (size_t)positions_T[t] * R, *sin_R = sin_PR + (size_t)positions_T[t] * R;
  if (head < H) {
    size_t row = (size_t)t * H + head;
    const T* q = q_THC + row * (N + 2 * R);
    for (int n = 4 * lane; n < N; n += 128)  // whole words: N is a multiple of 4
      *reinterpret_cast<uint2*>(q_plain_THN + row * N + n) = *reinterpret_cast<const uint2*>(q + n);
    return rotate(q + N, q_rope_THD + row * 2 * R, cos_R, sin_R, R, lane);
  }
  int slot = slots_T[t];
  if (slot < 0) return;
  const T* kv = kv_TC + (size_t)t * (L + 2 * R);
  T* out = cache + (size_t)slot * (L + 2 * R);
  float sum = 0.f;
  for (int l = lane; l < L; l += 32) sum += widen(kv[l]) * widen(kv[l]);
  float factor = rsqrtf(warp_sum(sum) / L + eps);
  for (int l = lane; l < L; l += 32) out[l] = narrow<T>(widen(kv[l]) * factor * norm_L[l]);
  rotate(kv + L, out + L, cos_R, sin_R, R, lane);
}

}  // namespace flm
