"""RWKV-4's ops against float64: any cut of the prompt, any company, states that begin anew at position 0."""

from __future__ import annotations

import numpy as np
import pytest

from flm.kernels.recurrent_ops import RecurrentOps


def steps(rng, lengths, cuts):
    """Rows (sequence, position) of successive steps: every sequence advances by the next of its cuts."""
    done = [0] * len(lengths)
    for widths in cuts:
        rows = []
        for s, width in enumerate(widths):
            rows += [(s, p) for p in range(done[s], min(done[s] + width, lengths[s]))]
            done[s] = min(done[s] + width, lengths[s])
        yield np.array(rows, np.int32).reshape(-1, 2)
    assert done == list(lengths)


def test_both_backends_have_the_ops(cpu, exact):
    assert isinstance(cpu, RecurrentOps)
    assert isinstance(exact, RecurrentOps)


@pytest.mark.parametrize("channels", [1, 17, 64, 200])
def test_recurrence_against_float64_and_cut_anyhow(cpu, cpu1, exact, rng, channels):
    lengths = (11, 3, 7)
    data = [[rng.standard_normal((n, channels)).astype(np.float32) * 3 for n in lengths] for _ in range(3)]
    decay = -np.exp(rng.standard_normal(channels)).astype(np.float32)
    bonus = rng.standard_normal(channels).astype(np.float32)
    results = []
    for backend in (cpu, exact, cpu1):
        for cuts in ([(11, 3, 7)], [(1, 0, 2)] * 3 + [(8, 3, 1)], [(1, 1, 1)] * 11):
            state = np.full(
                (4, 3, channels), 7.0, np.float64 if backend is exact else np.float32
            )  # somebody's before
            got = [np.zeros((n, channels)) for n in lengths]
            for rows in steps(rng, lengths, cuts):
                sequences, positions = (np.ascontiguousarray(column) for column in rows.T)
                r, k, v = (np.stack([part[s][p] for s, p in rows]) for part in data)
                out = np.zeros((len(rows), channels), state.dtype)
                backend.wkv(r, k, v, decay, bonus, state, sequences, positions, out)
                for (s, p), value in zip(rows, out, strict=True):
                    got[s][p] = value
            results.append(np.concatenate(got))
    want = results[3]
    for got in results[:3]:
        assert np.allclose(got, want, rtol=2e-5, atol=2e-6)
    for other in (1, 2, 6, 7, 8):
        assert np.array_equal(results[0], results[other])


# the widest ones of each op are shared among threads, see SMALL in emitter.py
@pytest.mark.parametrize(("width", "lengths"), [(1, (5, 3)), (17, (5, 3)), (64, (5, 3)), (2500, (10, 3))])
def test_token_shift(cpu, exact, rng, width, lengths):
    data = [rng.standard_normal((n, width)).astype(np.float32) for n in lengths]
    mix = rng.random((3, width)).astype(np.float32)
    results = []
    for backend in (cpu, exact):
        for cuts in ([lengths], [(1, 2), (3, 0), (lengths[0] - 4, 1)]):
            last = np.full((2, width), 9.0, np.float32)
            got = [np.zeros((3, n, width)) for n in lengths]
            for rows in steps(rng, lengths, cuts):
                sequences, positions = (np.ascontiguousarray(column) for column in rows.T)
                h = np.stack([data[s][p] for s, p in rows])
                out = np.zeros((3, len(rows), width), np.float32)
                backend.token_shift(h, last, sequences, positions, mix, out)
                for t, (s, p) in enumerate(rows):
                    got[s][:, p] = out[:, t]
            results.append(np.concatenate(got, axis=1))
    assert np.allclose(results[0], results[2], rtol=1e-6, atol=1e-6)
    assert np.array_equal(results[0], results[1])
    assert np.allclose(results[0][:, 0], data[0][0] * mix, rtol=1e-6)


def test_padding_keeps_nothing(cpu, rng):
    h, last, out = (
        np.ones((2, 16), np.float32),
        np.full((1, 16), 3.0, np.float32),
        np.zeros((1, 2, 16), np.float32),
    )
    index, positions = np.array([-1, 0], np.int32), np.array([0, 5], np.int32)
    cpu.token_shift(h, last, index, positions, np.full((1, 16), 0.5, np.float32), out)
    assert (out[0, 1] == 2.0).all()
    assert (last == 1.0).all()


@pytest.mark.parametrize("width", [1, 17, 500])
def test_squared_relu_and_gate(cpu, cpu1, exact, rng, width):
    for tokens in (1, 7, 130):
        x, r = (rng.standard_normal((tokens, width)).astype(np.float32) * 4 for _ in range(2))
        for call in (lambda b, y: b.squared_relu(y), lambda b, y, r=r: b.sigmoid_gate(r, y)):
            got, alone, want = x.copy(), x.copy(), x.astype(np.float64)
            call(cpu, got)
            call(cpu1, alone)
            call(exact, want)
            assert np.array_equal(got, alone)
            assert np.allclose(got, want, rtol=1e-6, atol=1e-7)
