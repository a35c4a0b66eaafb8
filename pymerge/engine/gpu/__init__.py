"""Merging model folders on a GPU: the same plan, files and bits as on the CPU, computed elsewhere.

device.py    what the engine asks of a GPU: memory, streams, copies, kernels
batches.py   tensors cut and grouped into what one launch takes
staging.py   inputs read ahead into pinned memory
pipeline.py  copies in, kernels and copies out, side by side
solve.py     layers with statistics, solved there and otherwise on the CPU
run.py       the engine's run over all of it
"""
