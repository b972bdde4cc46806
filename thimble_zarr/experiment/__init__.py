"""Thimble 1 itself: data, model and training loop, as an ordinary user of the recorder."""
