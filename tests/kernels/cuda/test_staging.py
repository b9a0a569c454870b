"""A step's inputs on their way to the device, emulated."""

from __future__ import annotations

import numpy as np
from emulator import EmulatedDevice
from kernel_checks import assert_caught, sweep

from flm.kernels.cuda import staging
from flm.kernels.staging import HostStaged

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
    assert_caught([KERNEL], ("(i < count &&", "(i < count - 1 &&"), check_staging)
    assert_caught([KERNEL], (") out[index[i]]", ") out[i]"), check_staging)


def check_scatter(device):
    """From one array of the device to places of another, as the host's memory has it too; -1: nowhere."""
    heirs, ids = np.array([3, -1, 0, -1, -1], np.int32), np.arange(4, dtype=np.int32)
    drawn, want = np.array([50, 51, 52, 53, 54], np.int32), [52, 1, 2, 50]
    for staged in (
        staging.CudaStaged(device, {"heirs": heirs, "ids": ids}, np.zeros((1, 1), np.int32)),
        HostStaged({"heirs": heirs, "ids": ids.copy()}, np.zeros((1, 1), np.int32)),
    ):
        staged.push()
        staged.scatter("heirs", device.asarray(drawn), "ids")
        assert staged.arrays["ids"].tolist() == want


def test_what_was_drawn_goes_to_its_tokens():
    sweep(EmulatedDevice([KERNEL]), check_scatter)
    assert_caught([KERNEL], (" && index[i] >= 0", " && index[i] > 0"), check_scatter)


def test_a_slab_is_filled_again_once_it_was_read():
    waited = []

    class Device(EmulatedDevice):
        def send(self, host, array):
            super().send(host, array)
            return lambda: waited.append(host.ctypes.data)

    arrays = {"ids": np.zeros(7, np.int32)}
    staged = staging.CudaStaged(Device([KERNEL]), arrays, np.zeros((1, 1), np.int32))
    for _ in range(staging.SLABS):
        staged.push()
    assert not waited
    for _ in range(2 * staging.SLABS):
        staged.push()
    assert waited[: staging.SLABS] == waited[staging.SLABS :]
    assert len(set(waited)) == staging.SLABS
