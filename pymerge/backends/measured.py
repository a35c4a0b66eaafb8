"""Which GPU backend is faster on which device, by the committed measurements. Written by benchmarks/prefer.py."""

# Device, as torch names it -> "ties" (and `select`) or "cg" -> backend.
FASTER: dict[str, dict[str, str]] = {}
