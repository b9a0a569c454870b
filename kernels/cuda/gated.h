// gated.h - what a grouped product does with its sums.
//
// Where GATED, a tile's rows 0..7 are those of eight features' gates and rows 8..15 those of their ups.
#pragma once
#include "slice.h"

namespace flm {

__device__ __forceinline__ float silu_times(float gate, float up) {
  return up * (gate / (1.f + __expf(-gate)));  // exp = inf gives -0, the limit
}

}  // namespace flm
