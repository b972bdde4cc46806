"""The contract: what is on disk, and the only place that reads and writes it."""
