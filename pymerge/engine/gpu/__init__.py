"""Merging model folders on a GPU: the same plan, the same files, the same bits as on the CPU.

device.py    what the engine asks of a GPU: memory, streams, copies, kernels
executor.py  the executor of the tensors that go through the pipeline; rules of parts
sizes.py     buffer sizes, and the least memory with which a merge is tried
batches.py   tensors cut and grouped into what one launch takes
staging.py   inputs read ahead into pinned memory
pipeline.py  copies in, kernels and copies out, overlapped
solve.py     layers with statistics, solved on the GPU or else on the CPU
"""
