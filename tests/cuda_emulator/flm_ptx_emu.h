// flm_ptx_emu.h - what each wrapper of kernels/cuda/flm_ptx.h does, in plain C++.
#pragma once
#include "emu_cuda.h"

#define FLM_SMEM(T, name, n)         \
  static const char name##_site = 0; \
  T* name = static_cast<T*>(::emu::shared(&name##_site, sizeof(T) * (n)))
#define FLM_DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(::emu::g.current->block->dyn)

namespace flm {

inline void check_aligned(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) emu::fail(std::string(what) + ": the address is not aligned");
}
template <int BYTES>
inline void emu_copy_async(void* dst, const void* src, bool ok) {
  check_aligned(dst, BYTES, "cp.async");
  if (ok) check_aligned(src, BYTES, "cp.async");
  emu::g.current->open.push_back({dst, src, ok ? BYTES : 0, ok ? 0 : BYTES});
  if (!emu::g.eager) return;
  if (ok) std::memcpy(dst, src, BYTES);
  else std::memset(dst, 0, BYTES);
}
inline void cp_async16(void* dst, const void* src, bool ok = true) { emu_copy_async<16>(dst, src, ok); }
inline void cp_async8(void* dst, const void* src, bool ok = true) { emu_copy_async<8>(dst, src, ok); }
inline void cp_async_commit() {
  auto* f = emu::g.current;
  f->groups.push_back(std::move(f->open));
  f->open.clear();
}
// Copies here and no earlier (a forgotten wait reads poison) or, in eager settings, did so at issue (a buffer that
// is refilled too early is overwritten).
template <int N>
inline void cp_async_wait() {
  auto& groups = emu::g.current->groups;
  while (static_cast<int>(groups.size()) > N) {
    if (!emu::g.eager)
      for (auto& c : groups.front()) {
        if (c.bytes) std::memcpy(c.dst, c.src, c.bytes);
        if (c.zeros) std::memset(c.dst, 0, c.zeros);
      }
    groups.erase(groups.begin());
  }
}

inline void emu_ldmatrix(uint32_t* r, int n, const void* row, bool trans, const char* what) {
  check_aligned(row, 16, what);
  auto rows = emu::collective(~0u, &row, sizeof row, what);
  int l = emu::g.current->lane, a = l >> 2, b = (l & 3) * 2;
  for (int i = 0; i < n; ++i) {
    auto at = [&](int r8, int column) {
      const char* p;
      std::memcpy(&p, rows[i * 8 + r8], sizeof p);
      uint16_t v;
      std::memcpy(&v, p + 2 * column, 2);
      return static_cast<uint32_t>(v);
    };
    r[i] = trans ? at(b, a) | at(b + 1, a) << 16 : at(a, b) | at(a, b + 1) << 16;
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emu_ldmatrix(r, 4, row, false, "ldmatrix.x4"); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  emu_ldmatrix(r, 4, row, true, "ldmatrix.x4.trans");
}

inline float emu_wide(__half, uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
inline float emu_wide(__nv_bfloat16, uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
// m16n8k16, lane = 4 * g + t: A (g | g + 8, 2t.. | 2t + 8..), B (2t.. | 2t + 8.., g), D (g | g + 8, 2t..); PTX ISA, mma.
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  float f[12];
  for (int i = 0; i < 4; ++i) f[2 * i] = emu_wide(T{}, a[i] & 0xffff), f[2 * i + 1] = emu_wide(T{}, a[i] >> 16);
  for (int i = 0; i < 2; ++i) f[8 + 2 * i] = emu_wide(T{}, b[i] & 0xffff), f[9 + 2 * i] = emu_wide(T{}, b[i] >> 16);
  auto lanes = emu::collective(~0u, f, sizeof f, "mma");
  int l = emu::g.current->lane, g = l >> 2, t = l & 3;
  for (int j = 0; j < 4; ++j) {
    int high = j >> 1, n = 2 * t + (j & 1);
    float sum = d[j];
    for (int q = 0; q < 4; ++q) {
      auto A = reinterpret_cast<const float*>(lanes[4 * g + q]);
      auto B = reinterpret_cast<const float*>(lanes[4 * n + q]);
      sum += A[2 * high] * B[8] + A[2 * high + 1] * B[9] + A[4 + 2 * high] * B[10] + A[5 + 2 * high] * B[11];
    }
    d[j] = sum;
  }
}
template <int TABLE>
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r = 0;
  for (int i = 0; i < 8; ++i)
    if (TABLE >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
inline uint4 ldg_stream(const uint4* p) {
  check_aligned(p, 16, "ld.global.v4");
  return *p;
}
inline float exp2_approx(float x) { return std::exp2(x); }
inline void st_release_sys(uint32_t* p, uint32_t v) {
  *p = v;
  ++emu::g.progress;
}
inline uint32_t ld_acquire_sys(const uint32_t* p) { return *const_cast<const volatile uint32_t*>(p); }
inline void spin_pause() { emu::yield("a flag"); }
// Time passes only where nothing else can happen (emu_runtime.cpp), so that just a wait without end times out.
inline int64_t clock_ns() {
  emu::g.clock_asked = true;
  return emu::g.now;
}

}  // namespace flm
