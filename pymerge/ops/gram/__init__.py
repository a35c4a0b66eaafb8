"""The ops `gram` and `combine`, and the methods that need nothing else."""
