"""A rank that sums arrays with others, as its own process: python summing_process.py FOLDER RANK SIZE DEVICE.

Needs no more than the communicator does. Prints the mean microseconds of a sum in a recorded step."""

import json
import sys
import time
from pathlib import Path

import numpy as np

from flm.worker.communication.comm import connect_processes
from flm.worker.group.backends import open_backend

TIMES = 20  # float32 still holds the doubled sums exactly

if __name__ == "__main__":
    folder, rank, size, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    backend = open_backend(device, 1)
    comm = connect_processes(Path(folder) / "group.shm", rank, size, backend, 60.0)
    comm.set_timeout(20.0)
    found = {}
    for shape in ((1, 8), (3, 5000), (4, 2048)):
        numbers = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 1000
        x = backend.asarray(numbers * (rank + 1))
        with comm.watched():
            comm.all_reduce(x)
        want = numbers * (size * (size + 1) // 2)
        assert np.array_equal(backend.to_host(x), want), f"rank {rank}, {shape}: a wrong sum"
        with backend.capture() as graph:
            comm.all_reduce(x)
        with comm.watched():
            for _ in range(2):
                graph.replay()
        start = time.perf_counter()
        with comm.watched():
            for _ in range(TIMES):
                graph.replay()
        seconds = time.perf_counter() - start
        again = want * np.float32(size) ** (TIMES + 2)
        assert np.array_equal(backend.to_host(x), again), (
            f"rank {rank}, {shape}: a wrong sum of a recorded step"
        )
        found[x.nbytes] = round(seconds / TIMES * 1e6, 1)
    comm.barrier()
    print(json.dumps(found))
