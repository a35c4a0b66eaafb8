"""Conjugate gradient: the iteration in plain torch, and vector updates on the CPU and on GPUs."""
