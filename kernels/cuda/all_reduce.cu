// Sums and gathers between the GPUs of a host over buffers that the ranks map from each other (CUDA IPC), in one shot, for
// short messages; and the sums of parts that NCCL has moved, for long ones. T: float, __half or __nv_bfloat16.
//
// A message is cut in pieces, and block b exchanges piece b through slot b. data[r]: rank r's contributions
// [2][slots][slot_bytes]; flags[r]: [slots][world], where rank s writes its epoch of a slot to flags[r][slot * world + s].
// An epoch counts a slot's exchanges and is kept in device memory, so that captured launches go on counting. Halves of the
// data take turns: a rank writes epoch e + 2 only after it has seen e + 1 of all, which they write after they have read e.
// control: two words of the host, [status, time-out in ms]. A wait ends when status is not 0, and past the time-out, when
// status becomes 1 + the rank that did not come.
// Sums are made in float, in rank order, and rounded to T: the same on every rank, whichever way the parts came.
#include "reduce.h"

namespace flm {

constexpr int64_t kLook = 1000000;  // ns of waiting between looks at the host's words, which lie behind the PCI bus

struct Peers {
  const uint64_t *data, *flags;
  uint32_t *epochs, *control;
  int rank, world, slots, slot_bytes;
};

template <class T>
__device__ __forceinline__ const T* part_of(const Peers& p, int rank, size_t offset) {
  return reinterpret_cast<const T*>(p.data[rank] + offset);
}
template <class T>
__device__ __forceinline__ void copy(T* to, const T* from, int n) {
  constexpr int V = 16 / sizeof(T);
  int whole = n / V * V;
  for (int i = threadIdx.x * V; i < whole; i += 256 * V)
    *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
  for (int i = whole + threadIdx.x; i < n; i += 256) to[i] = from[i];
}

__device__ __forceinline__ void wait_for(const Peers& p, int peer, uint32_t epoch) {
  const uint32_t* theirs = reinterpret_cast<const uint32_t*>(p.flags[p.rank]) + blockIdx.x * p.world + peer;
  int64_t start = clock_ns(), look = kLook;
  while ((int)(ld_acquire_sys(theirs) - epoch) < 0) {
    int64_t waited = clock_ns() - start;
    if (waited > look) {
      look = waited + kLook;
      if (ld_acquire_sys(p.control)) break;
      if (waited > (int64_t)ld_acquire_sys(p.control + 1) * 1000000) {
        st_release_sys(p.control, 1 + peer);
        break;
      }
    }
    spin_pause();
  }
}

// Publishes n elements, and waits for those of all ranks; gives the place of this block's slot in every rank's data.
template <class T>
__device__ __forceinline__ size_t meet(const Peers& p, const T* in, int n, uint32_t* shared_epoch) {
  int b = blockIdx.x;
  if (threadIdx.x == 0) *shared_epoch = p.epochs[b] + 1;
  __syncthreads();
  uint32_t epoch = *shared_epoch;
  size_t offset = ((size_t)(epoch & 1) * p.slots + b) * p.slot_bytes;
  copy<T>(reinterpret_cast<T*>(p.data[p.rank] + offset), in, n);
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x < p.world) {
    st_release_sys(reinterpret_cast<uint32_t*>(p.flags[threadIdx.x]) + b * p.world + p.rank, epoch);
    wait_for(p, threadIdx.x, epoch);
  }
  __syncthreads();
  if (threadIdx.x == 0) p.epochs[b] = epoch;
  return offset;
}

template <class T, int V>
__device__ __forceinline__ void add_ranks(float (&sum)[V], const Peers& p, size_t offset, int i) {
  float part[V];
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = 0.f;
  for (int r = 0; r < p.world; ++r) {
    load<T, V>(part, part_of<T>(p, r, offset) + i);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += part[j];
  }
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = widen(narrow<T>(sum[j]));
}

__device__ __forceinline__ int within(int64_t n, int64_t most) { return (int)(n < 0 ? 0 : n < most ? n : most); }

// x = the sum over ranks, in place; n elements in pieces of `piece`, a multiple of 8.
template <class T>
__global__ void __launch_bounds__(256)
all_reduce(const uint64_t* data, const uint64_t* flags, uint32_t* epochs, uint32_t* control, int rank, int world, int slots,
           int slot_bytes, T* x, int64_t n, int piece) {
  FLM_SMEM(uint32_t, epoch, 1);
  Peers p{data, flags, epochs, control, rank, world, slots, slot_bytes};
  x += (int64_t)blockIdx.x * piece;
  int count = within(n - (int64_t)blockIdx.x * piece, piece), whole = count & ~7;
  size_t offset = meet<T>(p, x, count, epoch);
  float sum[8], one[1];
  for (int i = threadIdx.x * 8; i < whole; i += 256 * 8) {
    add_ranks<T, 8>(sum, p, offset, i);
    store<T, 8>(x + i, sum);
  }
  for (int i = whole + threadIdx.x; i < count; i += 256) {
    add_ranks<T, 1>(one, p, offset, i);
    x[i] = narrow<T>(one[0]);
  }
}

// x += the sum over ranks of delta; out = rms_norm(x) (rms_norm.cu). Block b is token b; E is a multiple of 8.
template <class X, class T>
__global__ void __launch_bounds__(256)
all_reduce_rms_norm(const uint64_t* data, const uint64_t* flags, uint32_t* epochs, uint32_t* control, int rank, int world,
                    int slots, int slot_bytes, const T* delta_TE, int E, X* x_TE, const float* __restrict__ weight_E,
                    T* out_TE, float eps) {
  FLM_SMEM(uint32_t, epoch, 1);
  FLM_SMEM(float, warp_sums, 8);
  Peers p{data, flags, epochs, control, rank, world, slots, slot_bytes};
  size_t row = (size_t)blockIdx.x * E;
  size_t offset = meet<T>(p, delta_TE + row, E, epoch);
  float sum[8], v[8], squares = 0.f;
  for (int i = threadIdx.x * 8; i < E; i += 256 * 8) {
    add_ranks<T, 8>(sum, p, offset, i);
    load<X, 8>(v, x_TE + row + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      v[j] = widen(narrow<X>(v[j] + sum[j]));
      squares += v[j] * v[j];
    }
    store<X, 8>(x_TE + row + i, v);
  }
  float scale = rsqrtf(block_sum<8>(squares, warp_sums) / E + eps);
  for (int i = threadIdx.x * 8; i < E; i += 256 * 8) {
    load<X, 8>(v, x_TE + row + i);
    load<float, 8>(sum, weight_E + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = v[j] * scale * sum[j];
    store<T, 8>(out_TE + row + i, v);
  }
}

// out[s] = the ranks' rows s one after another. Rank r has [S][widths[r]]; the elements from `base` on of each, as they lie
// in memory, are exchanged in pieces.
template <class T>
__global__ void __launch_bounds__(256)
all_gather_cols(const uint64_t* data, const uint64_t* flags, uint32_t* epochs, uint32_t* control, int rank, int world,
                int slots, int slot_bytes, const T* x, const int* widths, int S, int columns, int64_t base, int piece,
                T* out) {
  FLM_SMEM(uint32_t, epoch, 1);
  Peers p{data, flags, epochs, control, rank, world, slots, slot_bytes};
  int64_t start = base + (int64_t)blockIdx.x * piece;
  size_t offset = meet<T>(p, x + start, within((int64_t)S * widths[rank] - start, piece), epoch);
  for (int r = 0, first = 0; r < world; first += widths[r++]) {
    int width = widths[r], count = within((int64_t)S * width - start, piece);
    const T* part = part_of<T>(p, r, offset);
    for (int i = threadIdx.x; i < count; i += 256) {
      int64_t at = start + i;
      out[at / width * columns + first + at % width] = part[i];
    }
  }
}

// x = root's x.
template <class T>
__global__ void __launch_bounds__(256)
broadcast(const uint64_t* data, const uint64_t* flags, uint32_t* epochs, uint32_t* control, int rank, int world, int slots,
          int slot_bytes, T* x, int64_t n, int piece, int root) {
  FLM_SMEM(uint32_t, epoch, 1);
  Peers p{data, flags, epochs, control, rank, world, slots, slot_bytes};
  x += (int64_t)blockIdx.x * piece;
  int count = within(n - (int64_t)blockIdx.x * piece, piece);
  size_t offset = meet<T>(p, x, rank == root ? count : 0, epoch);
  if (rank != root) copy<T>(x, part_of<T>(p, root, offset), count);
}

// x = the sum of x, which is rank's own, and the parts [world][stride] of the others, in rank order; n elements.
template <class T>
__global__ void __launch_bounds__(256)
sum_parts(const T* parts, int64_t stride, int rank, int world, T* x, int64_t n) {
  for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256) {
    float sum = 0.f;
    for (int r = 0; r < world; ++r) sum += widen(r == rank ? x[i] : parts[r * stride + i]);
    x[i] = narrow<T>(sum);
  }
}

// out [S][columns] from the ranks' [S][widths[r]], which lie one after another in parts; rank's own is x.
template <class T>
__global__ void __launch_bounds__(256)
place_columns(const T* parts, const T* x, const int* widths, int rank, int S, int columns, T* out) {
  int64_t n = (int64_t)S * columns;
  for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256) {
    int64_t s = i / columns;
    int c = (int)(i % columns), r = 0, first = 0;
    while (c >= first + widths[r]) first += widths[r++];
    int64_t at = s * widths[r] + (c - first);
    out[i] = r == rank ? x[at] : parts[(int64_t)S * first + at];
  }
}

}  // namespace flm
