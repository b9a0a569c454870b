// RWKV-4's recurrence (recurrent_ops.py). Block y is one state; its tokens stand together in the step, and a thread takes one
// channel through all of them, so that decode and prompts of any cut give the same bits.
#include "reduce.h"

namespace flm {

constexpr float kEmpty = -1e38f;  // the exponent of an empty sum

// The tokens of this block's state: first to one behind the last; first > last: none.
__device__ __forceinline__ int2 tokens_of(const int* __restrict__ sequence_T, int T) {
  FLM_SMEM(int, range, 2);
  if (threadIdx.x == 0) range[0] = T, range[1] = 0;
  __syncthreads();
  for (int t = threadIdx.x; t < T; t += 256)
    if (sequence_T[t] == (int)blockIdx.y) atomicMin(range, t), atomicMax(range + 1, t + 1);
  __syncthreads();
  return make_int2(range[0], range[1]);
}

template <class T>
__global__ void __launch_bounds__(256)
token_shift(const T* __restrict__ h_TE, float* __restrict__ last_SE, const int* __restrict__ sequence_T,
            const int* __restrict__ position_T, const float* __restrict__ mix_ME, T* __restrict__ out_MTE, int tokens,
            int E, int M) {
  int2 mine = tokens_of(sequence_T, tokens);
  int e = blockIdx.x * 256 + threadIdx.x;
  if (e >= E || mine.x >= mine.y) return;
  float& last = last_SE[(size_t)blockIdx.y * E + e];
  float before = position_T[mine.x] ? last : 0.f;
  for (int t = mine.x; t < mine.y; ++t) {
    float now = widen(h_TE[(size_t)t * E + e]);
    for (int m = 0; m < M; ++m) {
      float mix = mix_ME[(size_t)m * E + e];
      out_MTE[((size_t)m * tokens + t) * E + e] = narrow<T>(__fmaf_rn(now, mix, __fmul_rn(before, 1.f - mix)));
    }
    before = now;
  }
  last = before;
}

template <class T>
__global__ void __launch_bounds__(256)
wkv(const float* __restrict__ r_TC, const float* __restrict__ k_TC, const float* __restrict__ v_TC,
    const float* __restrict__ decay_C, const float* __restrict__ bonus_C, float* __restrict__ state_S3C,
    const int* __restrict__ sequence_T, const int* __restrict__ position_T, T* __restrict__ out_TC, int tokens, int C) {
  int2 mine = tokens_of(sequence_T, tokens);
  int c = blockIdx.x * 256 + threadIdx.x;
  if (c >= C || mine.x >= mine.y) return;
  float* state = state_S3C + (size_t)blockIdx.y * 3 * C + c;
  float decay = decay_C[c], bonus = bonus_C[c], top = 0.f, bottom = 0.f, power = kEmpty;
  if (position_T[mine.x]) top = state[0], bottom = state[C], power = state[2 * C];
  for (int t = mine.x; t < mine.y; ++t) {
    size_t at = (size_t)t * C + c;
    float k = k_TC[at], v = v_TC[at], high = fmaxf(power, bonus + k);
    float old = expf(power - high), added = expf(bonus + k - high);
    float sum = __fmaf_rn(old, top, __fmul_rn(added, v)) / __fmaf_rn(old, bottom, added);
    out_TC[at] = narrow<T>(sum / (1.f + expf(-r_TC[at])));
    high = fmaxf(power + decay, k);
    old = expf(power + decay - high), added = expf(k - high);
    top = __fmaf_rn(old, top, __fmul_rn(added, v)), bottom = __fmaf_rn(old, bottom, added), power = high;
  }
  state[0] = top, state[C] = bottom, state[2 * C] = power;
}

// x = max(x, 0)^2, in place.
template <class T>
__global__ void __launch_bounds__(256) squared_relu(T* x, int count) {
  int at = blockIdx.x * 256 + threadIdx.x;
  if (at >= count) return;
  float v = fmaxf(widen(x[at]), 0.f);
  x[at] = narrow<T>(v * v);
}

}  // namespace flm
