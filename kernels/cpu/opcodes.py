"""The shape of a program row: int64 [ROW_WIDTH], word 0 the address of the op, then what the op's docstring says."""

from numba import types

ROW_WIDTH = 26
OP = types.int64(types.int64)  # an op takes the address of its row and returns a status, 0 for success
