"""Vector updates of conjugate gradient: plain torch, the CPU's, and tables on a GPU."""
