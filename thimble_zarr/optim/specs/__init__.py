"""Each optimizer in a file of its own."""
