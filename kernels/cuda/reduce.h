// reduce.h - conversions to and from float, vectors of them, and sums over a block in an order that depends on its size
// alone.
#pragma once
#include "flm_ptx.h"

namespace flm {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) { return v; }
template <>
__device__ __forceinline__ __half narrow<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// V neighbours in memory, moved by as few instructions as their alignment allows (16 bytes each where V is 8).
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T v[V];
};
template <class T, int V>
__device__ __forceinline__ void load(float (&to)[V], const T* from) {
  Pack<T, V> p = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = widen(p.v[i]);
}
template <class T, int V>
__device__ __forceinline__ void store(T* to, const float (&from)[V]) {
  Pack<T, V> p;
#pragma unroll
  for (int i = 0; i < V; ++i) p.v[i] = narrow<T>(from[i]);
  *reinterpret_cast<Pack<T, V>*>(to) = p;
}

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(kAll, v, o);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(kAll, v, o));
  return v;
}
// The sum over a block of WARPS warps, on every thread. `scratch`: WARPS floats of shared memory that no thread uses
// for anything else until after the block's next barrier.
template <int WARPS>
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();
  v = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) v += scratch[w];
  return v;
}

}  // namespace flm
