"""What the models of a merge change, and what becomes of it (docs/analyze.md)."""
