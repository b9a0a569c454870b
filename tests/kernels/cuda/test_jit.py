"""The compile cache, and what NVRTC's assembler says of every kernel for sm_80 and sm_90."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from kernel_instances import INSTANCES

from flm.kernels.cuda import jit, nvrtc
from flm.kernels.cuda.kernel import Kernel, instance
from flm.kernels.errors import CompileError, UnsupportedDevice

SOURCE = '#include "part.h"\ntemplate <class T> __global__ void scale(T* x) { x[threadIdx.x] *= FACTOR; }\n'
SCALE = Kernel("scale.cu", "scale<float>")


# the last one of each kernel
ONE_OF_EACH = {(kernel.source, kernel.name.partition("<")[0]): kernel for kernel in INSTANCES}


@pytest.mark.parametrize(("arch", "kernels"), [(80, ONE_OF_EACH.values()), (90, INSTANCES)])
def test_every_kernel_builds_within_its_registers(arch, kernels):
    """Built once, then from the cache that the engine itself uses."""
    compiled = jit.compile_all(kernels, arch)
    wrong = [
        f"{kernel.source} {kernel.name}: {c.registers} registers of {INSTANCES[kernel]}, {c.local} local bytes"
        for kernel, c in compiled.items()
        if c.registers > INSTANCES[kernel] or c.spills or c.local or c.shared > 48 << 10
    ]
    assert not wrong


def test_every_source_has_an_instance():
    assert {k.source for k in INSTANCES} == {path.name for path in jit.FOLDER.glob("*.cu")}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "scale.cu").write_text(SOURCE)
    (tmp_path / "part.h").write_text("#pragma once\n#define FACTOR 2\n")
    return tmp_path


def test_a_warm_start_compiles_nothing(folder, monkeypatch):
    cold = jit.compile_kernel(SCALE, 90, folder / "cache", folder)
    assert cold.symbol.startswith("_Z") and 0 < cold.registers < 32 and cold.spills == 0
    assert cold.path.read_bytes().startswith(b"\x7fELF")
    monkeypatch.setattr(nvrtc, "build", lambda *a: pytest.fail("compiled again"))
    assert jit.compile_kernel(SCALE, 90, folder / "cache", folder) == cold


def test_ranks_that_start_together_compile_once(folder, monkeypatch):
    built, build, started = [], nvrtc.build, threading.Barrier(3)

    def counted(*args):
        built.append(args)
        return build(*args)

    def start():
        started.wait()
        return jit.compile_kernel(SCALE, 90, folder / "cache", folder)

    monkeypatch.setattr(nvrtc, "build", counted)
    with ThreadPoolExecutor(3) as pool:
        made = [future.result() for future in [pool.submit(start) for _ in range(3)]]
    assert len(built) == 1 and made[0] == made[1] == made[2]


def test_an_edited_header_is_compiled_anew(folder):
    first = jit.compile_kernel(SCALE, 90, folder / "cache", folder)
    (folder / "part.h").write_text("#pragma once\n#define FACTOR 3\n")
    second = jit.compile_kernel(SCALE, 90, folder / "cache", folder)
    assert first.path != second.path
    assert first.path.read_bytes() != second.path.read_bytes()


def test_architectures_and_instances_are_kept_apart(folder):
    cache = folder / "cache"
    kernels = (SCALE, Kernel("scale.cu", "scale<double>"))
    made = [jit.compile_kernel(kernel, arch, cache, folder).path for kernel in kernels for arch in (80, 90)]
    assert len(set(made)) == 4


def test_a_kernel_that_does_not_compile_says_why(folder):
    (folder / "scale.cu").write_text("template <class T> __global__ void scale(T* x) { y = 1; }")
    with pytest.raises(CompileError, match=r'scale.cu: scale<float> .*\n?.*identifier "y" is undefined'):
        jit.compile_kernel(SCALE, 90, folder / "cache", folder)
    assert not list((folder / "cache").glob("*.cubin"))


def test_old_gpus_are_refused(folder):
    with pytest.raises(UnsupportedDevice, match=r"8\.0 or newer expected, got 7\.5"):
        jit.compile_kernel(SCALE, 75, folder / "cache", folder)


def test_progress_counts_every_kernel(tmp_path):
    seen = []
    kernels = [instance("take_rows.cu", "take_rows", "uint4"), instance("take_rows.cu", "take_rows", "short")]
    jit.compile_all(kernels * 2, 90, lambda done, total, kernel: seen.append((done, total, kernel)), tmp_path)
    assert [s[:2] for s in seen] == [(1, 2), (2, 2)] and {s[2] for s in seen} == set(kernels)


def test_a_kernel_that_is_refused_leaves_the_others(tmp_path):
    kernels = [instance("take_rows.cu", "take_rows", kind) for kind in ("no_such_type", "uint4", "short")]
    with pytest.raises(CompileError, match=r"take_rows<no_such_type>"):
        jit.compile_all(kernels, 90, cache=tmp_path)
    assert len(list(tmp_path.glob("*.cubin"))) == 2
