"""Measurements of a real run, beside what the original notebooks would need.

`make bench` runs `benchmarks.__main__`, which starts everything it measures as a process of its
own. Only ratios and sizes travel between machines; times do not.
"""
