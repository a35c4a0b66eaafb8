"""Merging: read ahead, compute, write behind; model folders and state dicts."""
