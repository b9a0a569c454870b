// emu_runtime.cpp - runs launches: block by block, or several streams at once, under a chosen schedule.
#include <algorithm>
#include <cmath>
#include <csignal>
#include <memory>
#include <random>
#include "emu_cuda.h"

#ifndef FLM_EMU_UCONTEXT
// The callee-saved registers change with the stack.
asm(R"(
.text
.globl flm_emu_switch
.type flm_emu_switch,@function
flm_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size flm_emu_switch,.-flm_emu_switch
)");
#endif

namespace emu {

static void on_fault(int, siginfo_t* info, void*) {
  char text[64];
  std::snprintf(text, sizeof text, "illegal address %p", info->si_addr);
  g.error = text + place(g.current);
  siglongjmp(g.fault, 1);
}
// Catches faults (guard pages behind test arrays) while a launch runs.
struct FaultGuard {
  struct sigaction old_segv, old_bus;
  stack_t old_stack;
  std::vector<unsigned char> stack = std::vector<unsigned char>(64 << 10);
  FaultGuard() {
    stack_t s{};
    s.ss_sp = stack.data();
    s.ss_size = stack.size();
    sigaltstack(&s, &old_stack);
    struct sigaction a{};
    a.sa_sigaction = on_fault;
    a.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &a, &old_segv);
    sigaction(SIGBUS, &a, &old_bus);
  }
  ~FaultGuard() {
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};

static void start(Block& k, Launch& l, int launch, uint3 bid) {
  int n = l.block.x * l.block.y * l.block.z;
  k.grid = l.grid;
  k.block = l.block;
  k.bid = bid;
  k.launch = launch;
  k.body = &l.body;
  k.live = n;
  k.sites.clear();
  if (!k.arena) {
    k.fibers.resize(n);
    k.warps.resize((n + 31) / 32);
    k.dyn_bytes = l.dyn;
    k.arena = static_cast<unsigned char*>(std::aligned_alloc(1024, kArena));
    k.dyn = static_cast<unsigned char*>(std::aligned_alloc(1024, (l.dyn + 1023) / 1024 * 1024 + kDynCanary));
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    k.stacks = static_cast<unsigned char*>(mmap(nullptr, kStack * n, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (k.stacks == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a block");
  }
  std::memset(k.dyn, kPoison, l.dyn + kDynCanary);
  std::memset(k.arena, kPoison, kArena);
  for (auto& b : k.barriers) b = {0, 0, 0, 0};
  for (auto& w : k.warps) {
    w.pending = 0;
    for (auto& s : w.snapshot) s.unread = 0;
  }
  unsigned x = l.block.x, y = l.block.y;
  for (unsigned t = 0; t < static_cast<unsigned>(n); ++t) {
    Fiber& f = k.fibers[t];
    f.block = &k;
    f.tid = {t % x, t / x % y, t / (x * y)};
    f.linear = t;
    f.lane = t & 31;
    f.warp = t >> 5;
    f.done = false;
    f.syncs = 0;
    f.waits = "start";
    f.groups.clear();
    f.open.clear();
    prepare(&f.context, k.stacks + kStack * t, fiber_main);
  }
}

// What must hold once a block has ended.
static void check(const Block& k) {
  bool over = false;
  for (size_t i = 0; i < kDynCanary; ++i) over |= k.dyn[k.dyn_bytes + i] != kPoison;
  for (auto& s : k.sites)
    for (size_t i = 0; i < kCanary; ++i) over |= k.arena[s.offset + s.bytes + i] != kPoison;
  if (over) throw std::runtime_error("write past the end of shared memory");
  for (auto& f : k.fibers)
    if (f.syncs != k.fibers[0].syncs)
      throw std::runtime_error("threads of one block passed different numbers of __syncthreads");
}

// A schedule runs units of fibers in turn. order 0: threads forward, 1: reverse, each once a round. From 2 on it is
// a seed: the unit is a warp, picked at random with weights over three decades that change now and then, and run
// until it can go no further, so that one warp, block or rank can be far ahead of the others.
struct Schedule {
  unsigned order, draws = 0, hours = 0;
  std::vector<std::vector<Fiber*>> units;
  std::vector<double> weights;
  std::mt19937 random;
  Schedule(unsigned order, unsigned seed) : order(order), random(seed) {}

  void add(Block& k) {
    size_t first = units.size();
    for (auto& f : k.fibers) {
      if (f.linear == 0 || (order > 1 && f.lane == 0)) units.emplace_back();
      units.back().push_back(&f);
    }
    for (size_t u = first; u < units.size(); ++u) {
      if (order == 1) std::reverse(units[u].begin(), units[u].end());
      if (order > 1) std::shuffle(units[u].begin(), units[u].end(), random);
    }
  }
  void pass(std::vector<Fiber*>& unit) {
    for (auto* f : unit) {
      if (f->done) continue;
      g.current = f;
      switch_to(&g.scheduler, &f->context);
      if (!g.error.empty()) throw std::runtime_error(g.error);
    }
  }
  bool step() {  // false: nothing could move
    auto ended = [](auto& u) { return std::all_of(u.begin(), u.end(), [](Fiber* f) { return f->done; }); };
    units.erase(std::remove_if(units.begin(), units.end(), ended), units.end());
    uint64_t before = g.progress;
    size_t n = units.size();
    if (order < 2) {
      for (size_t i = 0; i < n; ++i) pass(units[order ? n - 1 - i : i]);
      return g.progress != before;
    }
    if (draws++ % 64 == 0 || weights.size() != n) {
      weights.resize(n);
      for (auto& w : weights) w = std::pow(10.0, 3.0 * random() / random.max());
    }
    size_t i = std::discrete_distribution<size_t>(weights.begin(), weights.end())(random);
    for (size_t tried = 0; tried < n; ++tried, i = (i + 1) % n) {
      uint64_t seen;
      do {
        seen = g.progress;
        pass(units[i]);
      } while (g.progress != seen);
      if (g.progress != before) return true;
    }
    return false;
  }
  bool idle() const {
    for (auto& u : units)
      for (auto* f : u)
        if (!f->done) return false;
    return true;
  }
  // Nothing could move: an hour passes for those who watch the clock.
  void stuck() {
    if (!g.clock_asked || ++hours > 4) deadlock();
    g.clock_asked = false;
    g.now += int64_t(3600) * 1000000000;
  }
  [[noreturn]] void deadlock() const {
    std::string text = "deadlock:";
    int shown = 0;
    for (auto& u : units)
      for (auto* f : u)
        if (!f->done && shown < 4 && (shown == 0 || f->lane == 0)) {
          ++shown;
          text += place(f) + " waits at " + f->waits + ";";
        }
    throw std::runtime_error(text);
  }
};

// Block numbers in the order they start: forward, reverse, or shuffled like the threads.
static std::vector<uint3> block_ids(dim3 d, unsigned order) {
  std::vector<uint3> ids;
  for (unsigned z = 0; z < d.z; ++z)
    for (unsigned y = 0; y < d.y; ++y)
      for (unsigned x = 0; x < d.x; ++x) ids.push_back({x, y, z});
  if (order == 1) std::reverse(ids.begin(), ids.end());
  if (order > 1) std::shuffle(ids.begin(), ids.end(), std::mt19937(order));
  return ids;
}

static void run_alone(Launch& l, int number, unsigned order) {
  Block k;
  for (uint3 id : block_ids(l.grid, order)) {
    start(k, l, number, id);
    Schedule s(order, order + 7919 * id.x);
    s.add(k);
    while (k.live)
      if (!s.step()) s.stuck();
    check(k);
  }
}

using Blocks = std::vector<std::unique_ptr<Block>>;
static void run_streams(std::vector<Launch>& launches, const int* streams, unsigned order) {
  Schedule s(order, order);
  std::vector<Blocks> live(launches.size());
  std::vector<int> state(launches.size());  // 0 waiting, 1 running, 2 done
  for (bool more = true; more;) {
    more = false;
    for (size_t l = 0; l < launches.size(); ++l) {
      auto ended = [](auto& k) { return k->live == 0; };
      if (state[l] == 1 && std::all_of(live[l].begin(), live[l].end(), ended)) {
        for (auto& k : live[l]) check(*k);
        state[l] = 2;
      }
      bool head = state[l] == 0;
      for (size_t i = 0; i < l; ++i) head &= streams[i] != streams[l] || state[i] == 2;
      if (head) {
        for (uint3 id : block_ids(launches[l].grid, order)) {
          live[l].push_back(std::make_unique<Block>());
          start(*live[l].back(), launches[l], l, id);
          s.add(*live[l].back());
        }
        state[l] = 1;
        ++g.progress;
      }
      more |= state[l] != 2;
    }
    if (more && !s.step() && !s.idle()) s.stuck();
  }
}

void run_all(std::vector<Launch>& launches, int setting, const int* streams) {
  FaultGuard guard;
  g.error.clear();
  g.eager = setting & 1;
  g.now = 0;
  unsigned order = setting >> 1;
  for (auto& l : launches) {
    size_t n = static_cast<size_t>(l.block.x) * l.block.y * l.block.z;
    if (n < 1 || n > kMaxThreads) throw std::runtime_error("a block has 1 to 1024 threads");
    if (l.dyn > 227 * 1024) throw std::runtime_error("more than 227 KiB of dynamic shared memory");
  }
  if (sigsetjmp(g.fault, 1)) throw std::runtime_error(g.error);  // memory of the broken launch is not given back
  if (streams) return run_streams(launches, streams, order);
  for (size_t l = 0; l < launches.size(); ++l) run_alone(launches[l], l, order);
}

}  // namespace emu
