"""The op `masked`: choose the backend, call."""
