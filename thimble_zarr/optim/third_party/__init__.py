"""Optimizers of other packages, each in a file of its own."""
