"""What comes into a matrix while a model reads: moments of the inputs, and which weights would make good for inputs that are off.

Shape legend: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
FIRST = 8.0  # all tokens attend to the first: it counts as the square of this many
LONGEST = 2.0
LEAST_SHARE = 0.3
DAMPING = 0.01  # of the mean of the diagonal
MAKE_GOOD = 0.4  # of what seems to be off: all of it would fit this text, not others


@dataclass(frozen=True)
class Inputs:
    """The inputs of a matrix, token by token: `exact` of the model as it is, `rounded` after the matrices before were
    rounded. behind: by how much the sum that the matrix's outputs are added to is too small there [T, N], or None."""

    exact_TK: F32
    rounded_TK: F32
    first_T: NDArray[np.bool_]
    behind_TN: F32 | None = None

    def moments(self) -> F32:
        """Mean of x xᵀ. What is off the diagonal is taken back by a share, for few inputs say little of it."""
        T, K = self.rounded_TK.shape
        weighted = self.rounded_TK * self._factor_T1()
        moments: F32 = np.matmul(weighted.T, weighted)
        moments /= np.float32(T)
        share = np.float32(max(LEAST_SHARE, K / (K + T)))
        diagonal = moments.diagonal().copy()
        moments *= 1 - share
        np.fill_diagonal(moments, diagonal)
        return moments

    def target(self, values_NK: F32, moments_KK: F32) -> F32:
        """Weights that give for the rounded inputs more of what `values` give for the exact ones (arXiv:2504.02692): least
        squares, with a part of the change that this asks for."""
        weighted = self.rounded_TK * np.square(self._factor_T1()) / np.float32(len(self.rounded_TK))
        off_TK = self.exact_TK - self.rounded_TK
        if self.behind_TN is None:
            missing = values_NK @ (off_TK.T @ weighted)
        else:
            missing = (off_TK @ values_NK.T + self.behind_TN).T @ weighted
        damped = moments_KK.astype(np.float64)
        damped[np.diag_indices(len(damped))] += DAMPING * max(float(moments_KK.diagonal().mean()), 1e-20)
        change = np.linalg.solve(damped, missing.T.astype(np.float64)).T
        return (values_NK + MAKE_GOOD * change).astype(np.float32)

    def _factor_T1(self) -> F32:
        """How much a token counts. Inputs far longer than most, which some layers have, count as LONGEST times the median."""
        length_T = np.sqrt((self.rounded_TK * self.rounded_TK).mean(axis=1))
        longest = LONGEST * max(float(np.median(length_T)), 1e-20)
        shortened_T = np.minimum(1, longest / np.maximum(length_T, longest))
        return (shortened_T * np.where(self.first_T, FIRST, 1)).astype(np.float32)[:, None]
