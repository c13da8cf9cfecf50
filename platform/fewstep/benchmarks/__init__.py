"""Benchmarks of the library: its kernels, and one step of training."""
