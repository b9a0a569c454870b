// emu_core.h - the execution model of one thread block on a CPU: fibers, barriers, warp collectives, shared memory.
//
// Threads of a block are fibers. A fiber runs until it meets a collective (__syncthreads, *_sync, mma, ldmatrix) or
// ends. That is the extreme interleaving, so a missing barrier shows as a wrong number or as poison (NaN).
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>
#include <sys/mman.h>
#ifndef __x86_64__
#define FLM_EMU_UCONTEXT  // the portable, slower way to switch stacks
#endif
#ifdef FLM_EMU_UCONTEXT
#include <ucontext.h>
#endif
#include <vector_functions.h>
#include <vector_types.h>

namespace emu {

constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 128 << 10;  // bytes a fiber, lazily backed
constexpr int kSlotBytes = 64;        // largest value that one lane hands over in a warp collective
constexpr size_t kArena = 256 << 10;  // static shared memory of a block
constexpr size_t kCanary = 64;        // bytes behind each shared array that must stay as they were
constexpr size_t kDynCanary = 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in half, bfloat16, float and double

// ---- context switch: callee-saved registers only; kernels never change mxcsr or x87 state ----
#ifndef FLM_EMU_UCONTEXT
using Context = void*;
extern "C" void flm_emu_switch(Context* save, Context load);
inline void switch_to(Context* save, Context* load) { flm_emu_switch(save, *load); }
inline void prepare(Context* context, unsigned char* stack, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(stack + kStack - 64);
  *--sp = nullptr;  // keeps the stack 16-byte aligned at entry
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  *context = sp;
}
#else
using Context = ucontext_t;
inline void switch_to(Context* save, Context* load) { swapcontext(save, load); }
inline void prepare(Context* context, unsigned char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#endif

struct Snapshot {
  uint32_t unread;
  alignas(16) unsigned char value[32][kSlotBytes];
};
struct Warp {
  alignas(16) unsigned char slot[32][kSlotBytes];
  uint32_t pending;
  uint32_t mask[32];
  const char* what[32];
  int got[32];
  Snapshot snapshot[33];  // one for each lane that has not read yet, and one to fill
};
struct Copy {
  void* dst;
  const void* src;
  int bytes, zeros;
};
struct Block;
struct Fiber {
  Context context;
  Block* block;
  uint3 tid;
  int linear, lane, warp, syncs;
  bool done;
  const char* waits;                      // what it waits for, for the report of a deadlock
  std::vector<std::vector<Copy>> groups;  // cp.async groups committed and not yet waited for
  std::vector<Copy> open;
};
struct Barrier {
  int arrived;
  uint64_t generation;
  int expect, line;
};
struct Site {
  const void* key;
  size_t offset, bytes;
};
struct Block {
  dim3 grid, block;
  uint3 bid;
  int launch, live;
  std::function<void()>* body;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::vector<Site> sites;
  unsigned char *arena = nullptr, *dyn = nullptr, *stacks = nullptr;
  size_t dyn_bytes = 0;
  Block() = default;
  Block(const Block&) = delete;
  ~Block() {
    std::free(arena);
    std::free(dyn);
    if (stacks) munmap(stacks, kStack * fibers.size());
  }
};
struct State {
  Fiber* current = nullptr;
  Context scheduler;
  uint64_t progress = 0;  // counts everything that can let another fiber move
  std::string error;
  bool eager = false;  // cp.async copies at issue, else at wait
  int64_t now = 0;     // ns
  bool clock_asked = false;
  sigjmp_buf fault;
};
inline State g;

inline void yield(const char* why) {
  Fiber* f = g.current;
  f->waits = why;
  switch_to(&f->context, &g.scheduler);
}

inline std::string place(const Fiber* f) {
  char text[160];
  uint3 b = f->block->bid;
  std::snprintf(text, sizeof text, " [launch %d block %u,%u,%u thread %u,%u,%u]", f->block->launch, b.x, b.y, b.z,
                f->tid.x, f->tid.y, f->tid.z);
  return text;
}

[[noreturn]] inline void fail(const std::string& message) {
  if (g.error.empty()) g.error = message + place(g.current);
  for (;;) yield("failed");
}

// expect <= 0: every live thread of the block.
inline void barrier(int id, int expect, int line) {
  Fiber* f = g.current;
  Block& k = *f->block;
  Barrier& b = k.barriers[id];
  ++g.progress;
  if (id == 0) ++f->syncs;
  if (b.arrived && b.line != line)
    fail("threads of one block meet at two __syncthreads: lines " + std::to_string(b.line) + " and " +
         std::to_string(line));
  uint64_t mine = b.generation;
  b.expect = expect;
  b.line = line;
  if (++b.arrived >= (expect > 0 ? expect : k.live)) {
    b.arrived = 0;
    ++b.generation;
    return;
  }
  while (b.generation == mine) yield(id ? "a named barrier" : "__syncthreads");
}

// Every lane of the mask hands over `bytes`; returns, once all have, a snapshot of all their values. The last to
// arrive takes the snapshot, so that a lane may run on to its next collective before the others have read.
// Masks that do not overlap (half warps, tiles) may be under way at once.
using Values = const unsigned char (*)[kSlotBytes];
inline void take_snapshot(Warp& w, uint32_t mask, int bytes, const char* what) {
  int k = 0;
  while (w.snapshot[k].unread) ++k;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    if (w.mask[i] != mask) fail(std::string(what) + ": lanes of one warp give different masks");
    if (std::strcmp(w.what[i], what)) fail(std::string("a warp meets at two places: ") + what + " and " + w.what[i]);
    std::memcpy(w.snapshot[k].value[i], w.slot[i], bytes);
    w.got[i] = k;
  }
  w.snapshot[k].unread = mask;
  w.pending &= ~mask;
}
inline Values collective(uint32_t mask, const void* in, int bytes, const char* what) {
  Fiber* f = g.current;
  Warp& w = f->block->warps[f->warp];
  int me = f->lane;
  if (!(mask >> me & 1)) fail(std::string(what) + ": the calling lane is not in its own mask");
  ++g.progress;
  std::memcpy(w.slot[me], in, bytes);
  w.mask[me] = mask;
  w.what[me] = what;
  w.pending |= 1u << me;
  if ((w.pending & mask) == mask) take_snapshot(w, mask, bytes, what);
  while (w.pending >> me & 1) yield(what);
  Snapshot& got = w.snapshot[w.got[me]];
  got.unread &= ~(1u << me);  // the caller reads before any other fiber runs
  return got.value;
}

// Static shared memory by call site: FLM_SMEM of flm_ptx.h. Poisoned for every block, a canary behind each.
inline void* shared(const void* key, size_t bytes) {
  Block& k = *g.current->block;
  for (auto& s : k.sites)
    if (s.key == key) return k.arena + s.offset;
  size_t offset = 0;
  if (!k.sites.empty()) offset = (k.sites.back().offset + k.sites.back().bytes + kCanary + 127) / 128 * 128;
  if (offset + bytes + kCanary > kArena) fail("more than 256 KiB of static shared memory");
  k.sites.push_back({key, offset, bytes});
  return k.arena + offset;
}

inline void fiber_main() {
  Fiber* f = g.current;
  Block& k = *f->block;
  (*k.body)();
  bool pending = !f->open.empty();
  for (auto& group : f->groups) pending |= !group.empty();
  if (pending && g.error.empty()) g.error = "a thread ended with cp.async under way" + place(f);
  f->done = true;
  --k.live;
  ++g.progress;
  for (auto& b : k.barriers)
    if (b.arrived && b.expect <= 0 && b.arrived >= k.live) {
      b.arrived = 0;
      ++b.generation;
    }
  for (;;) yield("done");
}

}  // namespace emu
