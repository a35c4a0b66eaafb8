"""Conjugate gradient of `mats` in Triton (docs/spec/mats.md): `cg` for layers of any size,
`cg_small` for small ones.
"""
