// Low-rank adapters, each token's own: out[t] += scale * up (down x[t]), for every part of a product that its adapter changes.
// Tokens whose adapter is -1 are left alone. An adapter's parts stand in `parts`, P of them, unused ones with rank 0:
// where down [rank, K] and up [rank, outputs] begin in `factors`, the rank, the outputs, the first column of out, the first
// column of the room. T: the type of activations and factors; V: elements that a lane reads at once, a divisor of K.
#include "reduce.h"

namespace flm {

struct AdapterPart {
  long long down, up, rank, outputs, start, room;
};

// room[t] = scale * down x[t]. Block (t, part, eight values of the rank), a warp each; the sum's order depends on K alone.
template <class T, int V>
__global__ void __launch_bounds__(256)
adapter_shrink(const T* __restrict__ x_TK, const int* __restrict__ adapter_T, const AdapterPart* __restrict__ parts,
               const float* __restrict__ scales, const T* __restrict__ factors, float* __restrict__ room_TW, int K, int W,
               int P) {
  int adapter = adapter_T[blockIdx.x], lane = threadIdx.x & 31;
  int r = blockIdx.z * 8 + (threadIdx.x >> 5);
  if (adapter < 0) return;
  size_t number = (size_t)adapter * P + blockIdx.y;
  AdapterPart part = parts[number];
  if (r >= part.rank) return;
  const T* x = x_TK + (size_t)blockIdx.x * K;
  const T* down = factors + part.down + (size_t)r * K;
  float sum = 0.f, a[V], b[V];
  for (int k = lane * V; k < K; k += 32 * V) {
    load<T, V>(a, x + k);
    load<T, V>(b, down + k);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += a[j] * b[j];
  }
  sum = warp_sum(sum);
  if (lane == 0) room_TW[(size_t)blockIdx.x * W + part.room + r] = sum * scales[number];
}

// out[t] += up room[t]. Block (t, 256 outputs, part), a thread for each output.
template <class T>
__global__ void __launch_bounds__(256)
adapter_expand(const float* __restrict__ room_TW, const int* __restrict__ adapter_T, const AdapterPart* __restrict__ parts,
               const T* __restrict__ factors, T* __restrict__ out_TN, int W, int N, int P) {
  int adapter = adapter_T[blockIdx.x], n = blockIdx.y * 256 + threadIdx.x;
  if (adapter < 0) return;
  AdapterPart part = parts[(size_t)adapter * P + blockIdx.z];
  if (part.rank == 0 || n >= part.outputs) return;
  const float* values = room_TW + (size_t)blockIdx.x * W + part.room;
  const T* up = factors + part.up + n;
  float sum = 0.f;
  for (int r = 0; r < part.rank; ++r) sum += values[r] * widen(up[r * part.outputs]);
  T* out = out_TN + (size_t)blockIdx.x * N + part.start + n;
  *out = narrow<T>(widen(*out) + sum);
}

}  // namespace flm
