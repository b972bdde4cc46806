"""Which arrays a file has and what they mean, one module a layout."""
