"""Merging with many settings of a method's parameters (docs/sweeps.md)."""
