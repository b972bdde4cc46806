"""The audit of a recording while it is made."""
