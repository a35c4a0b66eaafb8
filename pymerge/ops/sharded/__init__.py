"""Merging DTensors where their shards are (docs/distributed.md)."""
