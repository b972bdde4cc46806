"""The summary of a run: a dozen numbers a step and token, computed in one pass and kept."""
