"""A step's inputs on their way to the device, emulated."""

from __future__ import annotations

import numpy as np
from emulator import EmulatedDevice
from kernel_checks import assert_caught, sweep

from flm.kernels.cuda import staging

KERNEL = staging.scatter_kernel()


def check_staging(device):
    rng = np.random.default_rng(1)
    arrays = {"ids": np.zeros(7, np.int32), "cos": np.zeros((3, 5), np.float32)}
    table = np.zeros((40, 50), np.int32)
    staged = staging.CudaStaged(device, arrays, table)
    for changes in ([], [(0, 1)], [(7, 300), (3, 5), (1999, 1)], [(100, 900), (0, 400)], [(5, 2), (5, 2)]):
        for array in arrays.values():
            array[...] = rng.integers(0, 99, array.shape)
        for first, count in changes:
            table.reshape(-1)[first : first + count] = rng.integers(1, 99, count)
            staged.note(first, count)
        staged.push()
        for name, array in arrays.items():
            assert np.array_equal(staged.arrays[name], array)
        assert np.array_equal(staged.table, table)


def test_the_device_has_what_the_host_has():
    sweep(EmulatedDevice([KERNEL]), check_staging)
    assert_caught([KERNEL], ("(i < count)", "(i < count - 1)"), check_staging)
    assert_caught([KERNEL], (") out[index[i]]", ") out[i]"), check_staging)
