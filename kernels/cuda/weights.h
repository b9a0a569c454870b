// weights.h - packed weights: 16 rows by 16, 32 or 64 inputs a tile, in the order in which mma's A fragment wants them.
//
// codes: uint4 [row tiles][k tiles][32 lanes]; a tile has kSteps steps of 16 inputs. Of each step lane 4 * g + t holds
// rows g and g + 8, inputs 4 * t .. 4 * t + 3, as the mma's k indices 2t, 2t + 1, 2t + 8, 2t + 9: any order of k will do
// where x is read in the same, and this one lets a lane read its part of x as 8 bytes.
// Quantised: weight = scale * code + offset. S is the type of scale (and offset) of one row and group:
// __half or float without offsets, __half2 or float2 with; [row tiles][groups][16 rows].
#pragma once
#include "reduce.h"

namespace flm {

constexpr int kInt4 = 4, kInt8 = 8, kFloat8 = 9, kFloat16 = 16;  // FORMAT; the last is T itself
template <int FORMAT>
constexpr int kSteps = FORMAT == kFloat16 ? 1 : FORMAT == kInt4 ? 4 : 2;  // of 16 inputs in a tile
template <int FORMAT>
constexpr int kWords = 4 / kSteps<FORMAT>;  // of a lane's four, for each step

template <class T>
__device__ __forceinline__ uint32_t bits_of(T v) {
  return *reinterpret_cast<uint32_t*>(&v);
}
__device__ __forceinline__ __half2 as_half2(uint32_t v) { return *reinterpret_cast<__half2*>(&v); }
__device__ __forceinline__ __nv_bfloat162 as_bf162(uint32_t v) { return *reinterpret_cast<__nv_bfloat162*>(&v); }

constexpr int kAndOr = 0xea;  // lop3: (a & b) | c

// The four registers of an A fragment from the words of one step. Codes become the same whole numbers in T, exactly.
template <class T, int FORMAT>
struct Fragment;
template <class T>
struct Fragment<T, kFloat16> {
  static __device__ __forceinline__ void get(uint32_t (&a)[4], const uint32_t* w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = w[i];
  }
};
// Nibble i + 4h is element h of register i. 0x6400 is 1024 in half, where the last bit counts 1: 1024 + code.
template <>
struct Fragment<__half, kInt4> {
  static __device__ __forceinline__ void get(uint32_t (&a)[4], const uint32_t* words) {
    const __half2 c1024 = __float2half2_rn(1024.f), c64 = __float2half2_rn(-64.f), c16 = __float2half2_rn(0.0625f);
    uint32_t w = *words;
#pragma unroll
    for (int i = 0; i < 4; i += 2, w >>= 8) {
      a[i] = bits_of(__hsub2(as_half2(lop3<kAndOr>(w, 0x000f000fu, 0x64006400u)), c1024));
      a[i + 1] = bits_of(__hfma2(as_half2(lop3<kAndOr>(w, 0x00f000f0u, 0x64006400u)), c16, c64));
    }
  }
};
// 0x4300 is 128 in bfloat16, where the last bit counts 1.
template <>
struct Fragment<__nv_bfloat16, kInt4> {
  static __device__ __forceinline__ void get(uint32_t (&a)[4], const uint32_t* words) {
    const __nv_bfloat162 c128 = __float2bfloat162_rn(128.f);
    uint32_t w = *words;
#pragma unroll
    for (int i = 0; i < 4; ++i, w >>= 4)
      a[i] = bits_of(__hsub2(as_bf162(lop3<kAndOr>(w, 0x000f000fu, 0x43004300u)), c128));
  }
};
// Bytes are code + 128; byte 2 * (i & 1) + h of word i / 2 is element h of register i.
template <>
struct Fragment<__half, kInt8> {
  static __device__ __forceinline__ void get(uint32_t (&a)[4], const uint32_t* w) {
    const __half2 c1152 = __float2half2_rn(1152.f);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = bits_of(__hsub2(as_half2(__byte_perm(w[i >> 1], 0x64646464u, i & 1 ? 0x4342 : 0x4140)), c1152));
  }
};
template <>
struct Fragment<__nv_bfloat16, kInt8> {  // 0x4b000000 is 2^23: 2^23 + byte; whole numbers below 257 fit into bfloat16
  static __device__ __forceinline__ void get(uint32_t (&a)[4], const uint32_t* w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float low = __uint_as_float(__byte_perm(w[i >> 1], 0x4b000000u, i & 1 ? 0x7442 : 0x7440)) - 8388736.f;
      float high = __uint_as_float(__byte_perm(w[i >> 1], 0x4b000000u, i & 1 ? 0x7443 : 0x7441)) - 8388736.f;
      a[i] = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
    }
  }
};

// float8 e4m3, bytes as for int8. Its exponent and mantissa shifted into place, then the biases' difference multiplied in.
template <>
struct Fragment<__half, kFloat8> {
  static __device__ __forceinline__ void get(uint32_t (&a)[4], const uint32_t* w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t v = __byte_perm(w[i >> 1], 0u, i & 1 ? 0x3424 : 0x1404);  // each byte in the upper half of 16 bits
      v = (v & 0x80008000u) | ((v & 0x7f007f00u) >> 1);
      a[i] = bits_of(__hmul2(as_half2(v), __float2half2_rn(256.f)));
    }
  }
};
template <>
struct Fragment<__nv_bfloat16, kFloat8> {
  static __device__ __forceinline__ void get(uint32_t (&a)[4], const uint32_t* w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t v = __byte_perm(w[i >> 1], 0u, i & 1 ? 0x3424 : 0x1404);
      v = (v & 0x80008000u) | ((v & 0x7f007f00u) >> 4);
      a[i] = bits_of(__hmul2(as_bf162(v), __float2bfloat162_rn(1.329227995784916e36f)));  // 2^120
    }
  }
};

// Two floats as a pair of T.
template <class T>
__device__ __forceinline__ uint32_t pair(float low, float high) {
  return bits_of(__floats2half2_rn(low, high));
}
template <>
__device__ __forceinline__ uint32_t pair<__nv_bfloat16>(float low, float high) {
  return bits_of(__floats2bfloat162_rn(low, high));
}
// And back.
template <class T>
__device__ __forceinline__ void unpack(float& low, float& high, uint32_t both) {
  float2 v = __half22float2(as_half2(both));
  low = v.x, high = v.y;
}
template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(float& low, float& high, uint32_t both) {
  float2 v = __bfloat1622float2(as_bf162(both));
  low = v.x, high = v.y;
}
// Two ones in T.
template <class T>
constexpr uint32_t kOnes = 0x3c003c00u;
template <>
constexpr uint32_t kOnes<__nv_bfloat16> = 0x3f803f80u;

template <class S>
constexpr bool kHasOffset = false;
template <>
constexpr bool kHasOffset<__half2> = true;
template <>
constexpr bool kHasOffset<float2> = true;
__device__ __forceinline__ float scale_of(__half s) { return __half2float(s); }
__device__ __forceinline__ float scale_of(float s) { return s; }
__device__ __forceinline__ float scale_of(__half2 s) { return __low2float(s); }
__device__ __forceinline__ float scale_of(float2 s) { return s.x; }
__device__ __forceinline__ float offset_of(__half) { return 0.f; }
__device__ __forceinline__ float offset_of(float) { return 0.f; }
__device__ __forceinline__ float offset_of(__half2 s) { return __high2float(s); }
__device__ __forceinline__ float offset_of(float2 s) { return s.y; }

}  // namespace flm
