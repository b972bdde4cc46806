"""Callbacks that record what other people's trainers do. Each module needs its own library."""
