"""The accounting: formula and replay against what the weights did, step by step."""
