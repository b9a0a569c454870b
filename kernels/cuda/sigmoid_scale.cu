// x[t] *= sigmoid(gate[t]), in place; or, where each element has a gate of its own, x *= sigmoid(gate).
// G, T: the types of both; V: elements a thread handles, a divisor of E.
#include "reduce.h"

namespace flm {

template <class G, class T, int V, bool EACH>
__global__ void __launch_bounds__(256) sigmoid_scale(const G* __restrict__ gate, T* __restrict__ x_TE, int E) {
  int e = (blockIdx.y * 256 + threadIdx.x) * V;
  if (e >= E) return;
  size_t at = (size_t)blockIdx.x * E + e;
  float v[V], r[V];
  load<T, V>(v, x_TE + at);
  if (EACH) load<G, V>(r, gate + at);
  float one = EACH ? 0.f : widen(gate[blockIdx.x]);
#pragma unroll
  for (int j = 0; j < V; ++j) v[j] /= 1.f + __expf(-(EACH ? r[j] : one));
  store<T, V>(x_TE + at, v);
}

}  // namespace flm
