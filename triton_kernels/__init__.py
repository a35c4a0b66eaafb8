"""pymerge's Triton kernels, for NVIDIA and AMD GPUs. Imports nothing until a kernel is used."""

if __name__ != "pymerge.triton_kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; it is installed as pymerge.triton_kernels: "
        "import that, from outside the source tree or after `pip install -e .`"
    )
