// One token a row of logits, as reference_sampling.py specifies: penalties, temperature, min_p, top_k, top_p, a draw.
//
// A row is cut in slices of kSlice tokens, a block each. The last block that is done with a kernel's part of a row does
// what needs the whole row, so that few launches do: scan() finds the best token, which is all that greedy rows need;
// weigh() the amount in each of kSteps steps of likelihood, and draws where nothing is filtered; pick() gathers the
// tokens of the steps down to which filters may reach, few as a rule, from which one block filters and draws.
// penalise() comes before where a row has penalties. A row that has a NaN, or whose largest is infinite, gets the id -1.
#include "sampling.h"

namespace flm {

constexpr int kEach = 8, kSlice = kThreads * kEach, kSteps = 1024, kRoom = 10240, kMostSlices = 256;
constexpr float kStepsOfE = 32.f;  // steps to a factor of e

enum { kTop, kTotal, kCut, kMass };  // facts: bits of the adjusted maximum, of log of the sum of exp; last step; mass

// params: [S][8] floats: temperature, top_p, min_p, repetition, presence, frequency, -, -.
struct Parameters {
  const float *raw, *adjusted, *floats;
  int first, end, V, slices, s;
  __device__ __forceinline__ Parameters(const float* logits, const float* adjusted_SV, const float* params_S8,
                                        const int* row_ptr, int V)
      : V(V), slices(gridDim.x), s(blockIdx.y) {
    raw = logits + (size_t)s * V, floats = params_S8 + 8 * s, first = row_ptr[s], end = row_ptr[s + 1];
    bool changed = first < end && (floats[3] != 1.f || floats[4] != 0.f || floats[5] != 0.f);
    adjusted = changed ? adjusted_SV + (size_t)s * V : raw;
  }
  __device__ __forceinline__ Weights weights(const uint64_t* facts) const {
    return {__uint_as_float((uint32_t)facts[kTop]), __fdiv_rn(1.f, floats[0]), fminf(floats[2], 1.f)};
  }
};
__device__ __forceinline__ bool finite(float v) { return fabsf(v) < __int_as_float(0x7f800000); }
// Element i of this thread: a warp's 32 * kEach are neighbours.
__device__ __forceinline__ int element(int i) {
  return blockIdx.x * kSlice + (threadIdx.x >> 5) * 32 * kEach + 32 * i + (threadIdx.x & 31);
}
__device__ __forceinline__ void load_slice(float (&v)[kEach], const float* x, int V) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) v[i] = element(i) < V ? x[element(i)] : -__int_as_float(0x7f800000);
}
__device__ __forceinline__ int step_of(const Weights& w, float v) {
  return (int)fminf(__fmul_rn(__fmul_rn(__fsub_rn(w.top, v), w.inverse), kStepsOfE), kSteps - 1.f);
}
// Whether all other blocks of the row are done; what they wrote is then seen by loads that go to L2.
__device__ __forceinline__ bool last_of_row(unsigned* done, int slices) {
  FLM_SMEM(int, last, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *last = atomicAdd(done, 1u) == slices - 1;
    if (*last) *done = 0;  // for the next launch
    __threadfence();
  }
  __syncthreads();
  return *last;
}

// Grid: slices, rows. Others: ids counted for each row, see SamplingBatch.
__global__ void __launch_bounds__(kThreads)
penalise(const float* __restrict__ logits_SV, float* __restrict__ adjusted_SV, const float* __restrict__ params_S8,
         const int* __restrict__ row_ptr, const int* __restrict__ token_ids, const uint8_t* __restrict__ in_prompt,
         const int* __restrict__ output_count, int V) {
  Parameters row(logits_SV, adjusted_SV, params_S8, row_ptr, V);
  if (row.adjusted == row.raw) return;
  float *x = adjusted_SV + (size_t)row.s * V, v[kEach];
  load_slice(v, row.raw, V);
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (element(i) < V) x[element(i)] = v[i];
  __syncthreads();
  float repetition = row.floats[3], presence = row.floats[4], frequency = row.floats[5];
  for (int i = row.first + threadIdx.x; i < row.end; i += kThreads) {
    int id = token_ids[i], count = output_count[i];
    if (id / kSlice != blockIdx.x) continue;
    float a = row.raw[id];
    if (in_prompt[i] || count > 0) a = a > 0.f ? __fdiv_rn(a, repetition) : __fmul_rn(a, repetition);
    a = __fsub_rn(a, __fmul_rn(frequency, (float)count));
    x[id] = __fsub_rn(a, count > 0 ? presence : 0.f);
  }
}

// The N best of what `rank` gives, which sees the best of those before; out(n, rank) by one thread.
template <class F, class G>
__device__ __forceinline__ void best_of(int N, uint64_t* scratch, F rank, G out) {
  uint64_t last = ~0ull;
  for (int n = 0; n < N; ++n) {
    last = block_reduce(rank(last), scratch, larger);
    if (threadIdx.x == 0) out(n, last);
  }
}

// logprobs null: nobody asks for them, nor for the N best.
__global__ void __launch_bounds__(kThreads)
scan(const float* __restrict__ logits_SV, const float* __restrict__ adjusted_SV, const float* __restrict__ params_S8,
     const int* __restrict__ row_ptr, int* __restrict__ ids_S, float* __restrict__ logprobs_S,
     int* __restrict__ top_ids_SN, float* __restrict__ top_logprobs_SN, uint64_t* best_SP2, float* sum_SP,
     uint64_t* tops_SPN, uint64_t* facts_S4, unsigned* done_S3, unsigned* step_count_SK, uint64_t* step_mass_SK, int V,
     int N) {
  FLM_SMEM(uint64_t, scratch, kWarpCount);
  FLM_SMEM(float, sums, kWarpCount);
  Parameters row(logits_SV, adjusted_SV, params_S8, row_ptr, V);
  int s = row.s, P = row.slices;
  uint64_t *best = best_SP2 + (size_t)s * P * 2, *tops = tops_SPN + (size_t)s * P * N;
  float v[kEach];
  uint64_t mine[2] = {0, 0};
  if (row.adjusted != row.raw) {
    load_slice(v, row.adjusted, V);
#pragma unroll
    for (int i = 0; i < kEach; ++i) if (element(i) < V) mine[1] = larger(mine[1], ranked(v[i], element(i)));
    mine[1] = block_reduce(mine[1], scratch, larger);
  }
  load_slice(v, row.raw, V);
#pragma unroll
  for (int i = 0; i < kEach; ++i) if (element(i) < V) mine[0] = larger(mine[0], ranked(v[i], element(i)));
  mine[0] = block_reduce(mine[0], scratch, larger);
  if (row.adjusted == row.raw) mine[1] = mine[0];
  if (threadIdx.x < 2) best[2 * blockIdx.x + threadIdx.x] = threadIdx.x ? mine[1] : mine[0];
  if (logprobs_S) {
    float top = value_of(mine[0] >> 32), sum = 0.f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum = __fadd_rn(sum, element(i) < V ? __expf(v[i] - top) : 0.f);
    sum = block_sum<kWarpCount>(sum, sums);
    if (threadIdx.x == 0) sum_SP[(size_t)s * P + blockIdx.x] = sum;
    auto next = [&](uint64_t last) {
      uint64_t most = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        uint64_t r = element(i) < V ? ranked(v[i], element(i)) : 0;
        if (r < last) most = larger(most, r);
      }
      return most;
    };
    best_of(N, scratch, next, [&](int n, uint64_t rank) { tops[blockIdx.x * N + n] = rank; });
  }
  if (!last_of_row(done_S3 + 3 * s, P)) return;

  mine[0] = mine[1] = 0;
  for (int p = threadIdx.x; p < P; p += kThreads) {
    mine[0] = larger(mine[0], __ldcg(best + 2 * p));
    mine[1] = larger(mine[1], __ldcg(best + 2 * p + 1));
  }
  mine[0] = block_reduce(mine[0], scratch, larger);
  mine[1] = block_reduce(mine[1], scratch, larger);
  float total = 0.f;
  if (logprobs_S) {
    float top = value_of(mine[0] >> 32), sum = 0.f;
    for (int p = threadIdx.x; p < P; p += kThreads)
      sum += __ldcg(sum_SP + (size_t)s * P + p) * __expf(value_of(__ldcg(best + 2 * p) >> 32) - top);
    total = top + logf(block_sum<kWarpCount>(sum, sums));  // log of the sum of exp
    auto next = [&](uint64_t last) {
      uint64_t most = 0;
      for (int i = threadIdx.x; i < P * N; i += kThreads) {
        uint64_t r = __ldcg(tops + i);
        if (r < last) most = larger(most, r);
      }
      return most;
    };
    best_of(N, scratch, next, [&](int n, uint64_t rank) {
      top_ids_SN[s * N + n] = id_of(rank);
      top_logprobs_SN[s * N + n] = value_of(rank >> 32) - total;
    });
  }
  if (row.floats[0] > 0.f) {
    for (int i = threadIdx.x; i < kSteps; i += kThreads)
      step_count_SK[s * kSteps + i] = 0, step_mass_SK[s * kSteps + i] = 0;
  }
  if (threadIdx.x == 0) {
    facts_S4[4 * s + kTop] = __float_as_uint(value_of(mine[1] >> 32));
    facts_S4[4 * s + kTotal] = __float_as_uint(total);
    if (!finite(value_of(mine[1] >> 32))) {
      ids_S[s] = -1;
      if (logprobs_S) logprobs_S[s] = __int_as_float(0x7fffffff);
    } else if (row.floats[0] <= 0.f) {
      ids_S[s] = id_of(mine[1]);
      if (logprobs_S) logprobs_S[s] = row.raw[id_of(mine[1])] - total;
    }
  }
}

__device__ __forceinline__ void finish(const Parameters& row, int chosen, const uint64_t* facts, int* ids_S,
                                       float* logprobs_S) {
  if (threadIdx.x) return;
  ids_S[row.s] = chosen;
  if (logprobs_S) logprobs_S[row.s] = row.raw[chosen] - __uint_as_float((uint32_t)facts[kTotal]);
}

// The first step at which the running sum of amount(step) reaches `wanted`, or the last step. All threads.
template <class F>
__device__ __forceinline__ int step_at(uint64_t wanted, Shared& shared, F amount) {
  uint64_t sum = 0;
  for (int i = threadIdx.x; i < kSteps; i += kThreads) sum += amount(i);
  sum = block_reduce(sum, shared.scratch, added);
  return sum < wanted ? kSteps - 1 : locate(kSteps, wanted - 1, shared, amount);
}

// For rows that are drawn.
__global__ void __launch_bounds__(kThreads)
weigh(const float* __restrict__ logits_SV, const float* __restrict__ adjusted_SV, const float* __restrict__ params_S8,
      const int* __restrict__ row_ptr, const int* __restrict__ top_k_S, const uint64_t* __restrict__ seed_S,
      const int64_t* __restrict__ position_S, int* __restrict__ ids_S, float* __restrict__ logprobs_S,
      uint64_t* facts_S4, unsigned* done_S3, uint64_t* mass_SP, unsigned* step_count_SK, uint64_t* step_mass_SK, int V) {
  FLM_SMEM(Shared, memory, 1);
  FLM_SMEM(unsigned, counts, kSteps);
  FLM_SMEM(uint64_t, masses, kSteps);
  Shared& shared = *memory;
  Parameters row(logits_SV, adjusted_SV, params_S8, row_ptr, V);
  int s = row.s, P = row.slices, top_k = top_k_S[s];
  if (!(row.floats[0] > 0.f)) return;
  uint64_t* facts = facts_S4 + 4 * s;
  Weights weights = row.weights(facts);
  if (!finite(weights.top)) return;  // scan() has said so
  bool by_count = top_k > 0 && top_k < V, by_mass = !by_count && row.floats[1] < 1.f;
  for (int i = threadIdx.x; i < kSteps; i += kThreads) counts[i] = 0, masses[i] = 0;
  __syncthreads();
  float v[kEach];
  uint64_t sum = 0;
  load_slice(v, row.adjusted, V);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    uint64_t mass = weights.mass(v[i]);
    if (!mass) continue;
    sum += mass;
    if (by_count) atomicAdd(&counts[step_of(weights, v[i])], 1u);
    if (by_mass) atomicAdd(&masses[step_of(weights, v[i])], mass);
  }
  sum = block_reduce(sum, shared.scratch, added);
  if (threadIdx.x == 0) mass_SP[(size_t)s * P + blockIdx.x] = sum;
  for (int i = threadIdx.x; i < kSteps; i += kThreads) {
    if (counts[i]) atomicAdd(&step_count_SK[s * kSteps + i], counts[i]);
    if (masses[i]) atomicAdd(&step_mass_SK[s * kSteps + i], masses[i]);
  }
  if (!last_of_row(done_S3 + 3 * s + 1, P)) return;

  auto slice_mass = [&](int p) { return __ldcg(mass_SP + (size_t)s * P + p); };
  sum = 0;
  for (int p = threadIdx.x; p < P; p += kThreads) sum += slice_mass(p);
  uint64_t mass = block_reduce(sum, shared.scratch, added);
  if (by_count || by_mass) {
    int cut = by_count ? step_at(top_k, shared, [&](int i) { return (uint64_t)__ldcg(step_count_SK + s * kSteps + i); })
                       : step_at(wanted_mass(row.floats[1], mass), shared,
                                 [&](int i) { return __ldcg(step_mass_SK + s * kSteps + i); });
    if (threadIdx.x == 0) facts[kCut] = cut, facts[kMass] = mass;
    return;
  }
  uint64_t target = __umul64hi(random53(seed_S[s], (uint64_t)position_S[s]) << 11, mass), before = 0;
  int p = locate(P, target, shared, slice_mass);
  for (int q = threadIdx.x; q < p; q += kThreads) before += slice_mass(q);
  before = block_reduce(before, shared.scratch, added);
  const float* x = row.adjusted + p * kSlice;
  int chosen = locate(min(kSlice, V - p * kSlice), target - before, shared, [&](int i) { return weights.mass(x[i]); });
  finish(row, p * kSlice + chosen, facts, ids_S, logprobs_S);
}

// For rows of which top_k or top_p leaves a part. places: of the tokens that may be left, [S][slices][kSlice].
__global__ void __launch_bounds__(kThreads, 2)
pick(const float* __restrict__ logits_SV, const float* __restrict__ adjusted_SV, const float* __restrict__ params_S8,
     const int* __restrict__ row_ptr, const int* __restrict__ top_k_S, const uint64_t* __restrict__ seed_S,
     const int64_t* __restrict__ position_S, int* __restrict__ ids_S, float* __restrict__ logprobs_S,
     const uint64_t* facts_S4, unsigned* done_S3, unsigned* found_SP, unsigned short* places_SP, int V) {
  FLM_DYN_SMEM(float, values);  // kRoom of them, and as many ids
  FLM_SMEM(Shared, memory, 1);
  FLM_SMEM(int, found_of, kMostSlices);
  Shared& shared = *memory;
  Parameters row(logits_SV, adjusted_SV, params_S8, row_ptr, V);
  int s = row.s, P = row.slices, top_k = top_k_S[s], lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float top_p = row.floats[1];
  bool by_count = top_k > 0 && top_k < V;
  if (!(row.floats[0] > 0.f) || !(by_count || top_p < 1.f)) return;
  const uint64_t* facts = facts_S4 + 4 * s;
  Weights weights = row.weights(facts);
  if (!finite(weights.top)) return;
  int cut = (int)facts[kCut], *ids = reinterpret_cast<int*>(values + kRoom);
  unsigned* found = found_SP + (size_t)s * P;
  unsigned short* places = places_SP + (size_t)s * P * kSlice;

  float v[kEach];
  unsigned kept[kEach];
  int count = 0, before = 0;
  load_slice(v, row.adjusted, V);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    kept[i] = __ballot_sync(kAll, weights.mass(v[i]) != 0 && step_of(weights, v[i]) <= cut);
    count += __popc(kept[i]);
  }
  if (lane == 0) shared.scratch[warp] = count;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += (int)shared.scratch[w];
  if (warp == kWarpCount - 1 && lane == 0) found[blockIdx.x] = before + count;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (kept[i] >> lane & 1)
      places[blockIdx.x * kSlice + before + __popc(kept[i] & ((1u << lane) - 1))] = element(i) - blockIdx.x * kSlice;
    before += __popc(kept[i]);
  }
  if (!last_of_row(done_S3 + 3 * s + 2, P)) return;

  for (int p = threadIdx.x; p < P; p += kThreads) found_of[p] = __ldcg(found + p);
  __syncthreads();
  for (int p = warp; p < P; p += kWarpCount) {
    before = 0;
    for (int q = lane; q < p; q += 32) before += found_of[q];
#pragma unroll
    for (int o = 16; o; o >>= 1) before += __shfl_xor_sync(kAll, before, o);
    for (int i = lane; i < found_of[p] && before + i < kRoom; i += 32) {
      int id = p * kSlice + __ldcg(places + p * kSlice + i);
      values[before + i] = row.adjusted[id], ids[before + i] = id;
    }
  }
  uint64_t all = 0;
  for (int p = threadIdx.x; p < P; p += kThreads) all += found_of[p];
  count = (int)block_reduce(all, shared.scratch, added);  // and all values are there
  bool fits = count <= kRoom;  // else of all tokens, which takes longer
  Tokens tokens = {weights, fits ? values : row.adjusted, fits ? count : V};
  auto left = [&](bool masses) {
    uint64_t sum = 0;
    for (int i = threadIdx.x; i < tokens.count; i += kThreads) sum += masses ? tokens.mass(i) : tokens.mass(i) != 0;
    return block_reduce(sum, shared.scratch, added);
  };
  if (by_count && left(false) > top_k) keep_top(tokens, false, top_k, shared);
  if (top_p < 1.f) keep_top(tokens, true, wanted_mass(top_p, by_count ? left(true) : facts[kMass]), shared);
  uint64_t target = __umul64hi(random53(seed_S[s], (uint64_t)position_S[s]) << 11, left(true));
  int chosen = locate(tokens.count, target, shared, [&](int i) { return tokens.mass(i); });
  finish(row, fits ? ids[chosen] : chosen, facts, ids_S, logprobs_S);
}

}  // namespace flm
