// emu_cuda.h - the CUDA C++ names that a kernel uses, for g++ >= 12 and C++17.
//
// Types and host arithmetic of half, bfloat16 and fp8 come from NVIDIA's own headers (wheel nvidia-cuda-runtime),
// which a plain host compiler accepts; only the device functions are added here.
#pragma once
#define FLM_EMU 1
#include <cmath>
#include <limits>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include "emu_launch.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static_assert(false, "use FLM_SMEM or FLM_DYN_SMEM")
#define __constant__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

#define threadIdx (::emu::g.current->tid)
#define blockIdx (::emu::g.current->block->bid)
#define blockDim (::emu::g.current->block->block)
#define gridDim (::emu::g.current->block->grid)
#define warpSize 32
#define __syncthreads() ::emu::barrier(0, 0, __LINE__)

inline void __syncwarp(unsigned mask = ~0u) {
  int nothing = 0;
  emu::collective(mask, &nothing, 4, "__syncwarp");
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {
  ++emu::g.progress;
  emu::yield("__nanosleep");
}

// ---- warp collectives ----
template <class T>
inline T emu_shuffle(unsigned mask, T v, int source, const char* what) {
  static_assert(sizeof(T) <= emu::kSlotBytes);
  auto values = emu::collective(mask, &v, sizeof(T), what);
  if (!(mask >> (source & 31) & 1)) emu::fail(std::string(what) + ": the source lane is not in the mask");
  T r;
  std::memcpy(&r, values[source & 31], sizeof(T));
  return r;
}
inline int emu_lane() { return emu::g.current->lane; }
template <class T>
inline T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  return emu_shuffle(mask, v, (emu_lane() & ~(width - 1)) | (source & (width - 1)), "__shfl_sync");
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32) {
  int l = emu_lane(), s = l ^ x;
  return emu_shuffle(mask, v, (s & ~(width - 1)) == (l & ~(width - 1)) ? s : l, "__shfl_xor_sync");
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  int l = emu_lane();
  return emu_shuffle(mask, v, (l & (width - 1)) + delta < unsigned(width) ? l + delta : l, "__shfl_down_sync");
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  int l = emu_lane();
  return emu_shuffle(mask, v, unsigned(l & (width - 1)) >= delta ? l - delta : l, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  auto values = emu::collective(mask, &predicate, 4, "__ballot_sync");
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) {
    int v = 0;
    if (mask >> i & 1) std::memcpy(&v, values[i], 4);
    r |= unsigned(v != 0) << i;
  }
  return r;
}
template <class T, class F>
inline T emu_reduce(unsigned mask, T v, F pick, const char* what) {
  auto values = emu::collective(mask, &v, sizeof(T), what);
  for (int i = 0; i < 32; ++i) {
    T other = v;
    if (mask >> i & 1) std::memcpy(&other, values[i], sizeof(T));
    v = pick(v, other);
  }
  return v;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  return emu_reduce(mask, v, [](unsigned a, unsigned b) { return a > b ? a : b; }, "__reduce_max_sync");
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) {
  return emu_reduce(mask, v, [](unsigned a, unsigned b) { return a < b ? a : b; }, "__reduce_min_sync");
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// ---- memory ----
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T, class U> inline void __stcs(T* p, U v) { *p = v; }
template <class T, class F>
inline T emu_atomic(T* p, F update) {  // fibers change only at collectives
  T old = *p;
  *p = update(old);
  return old;
}
template <class T, class U> inline T atomicAdd(T* p, U v) { return emu_atomic(p, [&](T o) { return T(o + T(v)); }); }
template <class T, class U> inline T atomicSub(T* p, U v) { return emu_atomic(p, [&](T o) { return T(o - T(v)); }); }
template <class T, class U> inline T atomicMax(T* p, U v) { return emu_atomic(p, [&](T o) { return T(v) > o ? T(v) : o; }); }
template <class T, class U> inline T atomicMin(T* p, U v) { return emu_atomic(p, [&](T o) { return T(v) < o ? T(v) : o; }); }
template <class T, class U> inline T atomicExch(T* p, U v) { return emu_atomic(p, [&](T) { return T(v); }); }
template <class T, class U> inline T atomicOr(T* p, U v) { return emu_atomic(p, [&](T o) { return T(o | T(v)); }); }
template <class T, class U, class V>
inline T atomicCAS(T* p, U expected, V v) { return emu_atomic(p, [&](T o) { return o == T(expected) ? T(v) : o; }); }
inline unsigned atomicInc(unsigned* p, unsigned m) { return emu_atomic(p, [&](unsigned o) { return o >= m ? 0 : o + 1; }); }

// ---- integers and bits ----
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return (unsigned __int128)a * b >> 64; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t v = uint64_t(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned n = selector >> 4 * i & 15, c = v >> 8 * (n & 7) & 255;
    r |= (n & 8 ? (c & 128 ? 255 : 0) : c) << 8 * i;
  }
  return r;
}
template <class T, class F>
inline T emu_bits(F x) {
  static_assert(sizeof(T) == sizeof(F));
  T r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
inline float __int_as_float(int x) { return emu_bits<float>(x); }
inline int __float_as_int(float x) { return emu_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emu_bits<float>(x); }

// ---- arithmetic ----
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
// One rounding: the product of two halves, and its sum with a third, are exact in double.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(double(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(double(__bfloat162float(a)) * __bfloat162float(b) + __bfloat162float(c));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
