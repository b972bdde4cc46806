"""From a live optimizer to committed blocks. Knows torch and the format, nothing else."""
