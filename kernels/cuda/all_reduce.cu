// One-shot all-reduce over buffers that the ranks of a host map from each other (CUDA IPC), with the residual add and the
// norm that follow it in a decoder. Block b is token b.
//
// data[r]: rank r's contributions [2][slots][E] of T; flags[r]: [slots][world], where rank s writes its epoch of a slot to
// flags[r][slot * world + s]. An epoch counts a slot's reductions and is kept in device memory, so that captured launches
// go on counting. Halves of the data take turns: a rank writes epoch e + 2 only after it has seen e + 1 of all, which they
// write after they have read e. A wait is bounded: past `timeout` ns, status becomes 1 + the rank that did not come.
// The sum is added in rank order and rounded to T, so it is the same on every rank, and the same as reducing first.
#include "reduce.h"

namespace flm {

template <class T>
__device__ __forceinline__ const T* exchange(const uint64_t* data, const uint64_t* flags, uint32_t* epochs, int* status,
                                             const T* in, int rank, int world, int slots, int E, int64_t timeout,
                                             uint32_t* shared_epoch) {
  int b = blockIdx.x;
  if (threadIdx.x == 0) *shared_epoch = epochs[b] + 1;
  __syncthreads();
  uint32_t epoch = *shared_epoch;
  size_t offset = ((size_t)(epoch & 1) * slots + b) * E;
  T* mine = reinterpret_cast<T*>(data[rank]) + offset;
  for (int i = threadIdx.x * 8; i < E; i += 256 * 8)
    *reinterpret_cast<uint4*>(mine + i) = *reinterpret_cast<const uint4*>(in + (size_t)b * E + i);
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x < world) {
    st_release_sys(reinterpret_cast<uint32_t*>(flags[threadIdx.x]) + b * world + rank, epoch);
    const uint32_t* theirs = reinterpret_cast<const uint32_t*>(flags[rank]) + b * world + threadIdx.x;
    int64_t start = clock_ns();
    while ((int)(ld_acquire_sys(theirs) - epoch) < 0) {
      if (clock_ns() - start > timeout) {
        *status = 1 + threadIdx.x;
        break;
      }
      spin_pause();
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) epochs[b] = epoch;
  return reinterpret_cast<const T*>(offset * sizeof(T));  // to be added to each rank's data
}

template <class T>
__device__ __forceinline__ void add_ranks(float (&sum)[8], const uint64_t* data, const T* offset, int i, int world) {
  float part[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) sum[j] = 0.f;
  for (int r = 0; r < world; ++r) {
    load<T, 8>(part, reinterpret_cast<const T*>(data[r] + reinterpret_cast<uint64_t>(offset)) + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += part[j];
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) sum[j] = widen(narrow<T>(sum[j]));
}

// in = the sum over ranks, in place.
template <class T>
__global__ void __launch_bounds__(256)
all_reduce(const uint64_t* data, const uint64_t* flags, uint32_t* epochs, int* status, T* in_TE, int rank, int world,
           int slots, int E, int64_t timeout) {
  FLM_SMEM(uint32_t, epoch, 1);
  const T* offset = exchange<T>(data, flags, epochs, status, in_TE, rank, world, slots, E, timeout, epoch);
  float sum[8];
  for (int i = threadIdx.x * 8; i < E; i += 256 * 8) {
    add_ranks<T>(sum, data, offset, i, world);
    store<T, 8>(in_TE + (size_t)blockIdx.x * E + i, sum);
  }
}

// x += the sum over ranks of delta; out = rms_norm(x) (rms_norm.cu).
template <class X, class T>
__global__ void __launch_bounds__(256)
all_reduce_rms_norm(const uint64_t* data, const uint64_t* flags, uint32_t* epochs, int* status, const T* delta_TE, int rank,
                    int world, int slots, int E, int64_t timeout, X* x_TE, const float* __restrict__ weight_E, T* out_TE,
                    float eps) {
  FLM_SMEM(uint32_t, epoch, 1);
  FLM_SMEM(float, warp_sums, 8);
  const T* offset = exchange<T>(data, flags, epochs, status, delta_TE, rank, world, slots, E, timeout, epoch);
  size_t row = (size_t)blockIdx.x * E;
  float sum[8], v[8], squares = 0.f;
  for (int i = threadIdx.x * 8; i < E; i += 256 * 8) {
    add_ranks<T>(sum, data, offset, i, world);
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

}  // namespace flm
