// out = silu(gate) * up; gate is the first F columns of a row and up the last F. V: elements a thread, a divisor of F.
#include "reduce.h"

namespace flm {

template <class T, int V>
__global__ void __launch_bounds__(256) silu_mul(const T* __restrict__ gate_up_T2F, T* __restrict__ out_TF, int F) {
  int f = (blockIdx.y * 256 + threadIdx.x) * V;
  if (f >= F) return;
  size_t t = blockIdx.x;
  float gate[V], up[V];
  load<T, V>(gate, gate_up_T2F + t * 2 * F + f);
  load<T, V>(up, gate_up_T2F + t * 2 * F + F + f);
#pragma unroll
  for (int j = 0; j < V; ++j) up[j] *= gate[j] / (1.f + __expf(-gate[j]));  // exp = inf gives -0, the limit
  store<T, V>(out_TF + t * F + f, up);
}

}  // namespace flm
