"""What runs an op: the registry of op x backend, and the CPU's and CUDA's compiled kernels."""
