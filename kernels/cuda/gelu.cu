// out = x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3), which is x / (1 + exp(-2u)). out may be x.
// V: elements a thread.
#include "reduce.h"

namespace flm {

template <class T, int V>
__global__ void __launch_bounds__(256) gelu(const T* x, T* out, int count) {
  int at = (blockIdx.x * 256 + threadIdx.x) * V;
  if (at >= count) return;
  float v[V];
  load<T, V>(v, x + at);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    float u = 0.7978845608028654f * fmaf(0.044715f * v[j] * v[j], v[j], v[j]);
    v[j] /= 1.f + __expf(-2.f * u);  // exp = inf gives -0, the limit
  }
  store<T, V>(out + at, v);
}

}  // namespace flm
