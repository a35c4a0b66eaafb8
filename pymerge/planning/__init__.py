"""From a recipe and the headers of its models to a list of output tensors; no tensor data is
read.
"""
