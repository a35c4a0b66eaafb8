"""Backends: the registry of op x backend, and access to the compiled CPU and CUDA kernels."""
