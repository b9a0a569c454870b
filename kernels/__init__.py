"""Compute kernels of flm-cluster: one Backend protocol, a NumPy reference, and a numba CPU backend.

Importing this package imports nothing heavy; a backend compiles or loads its kernels when it is built.
"""
