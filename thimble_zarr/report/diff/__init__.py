"""What `diff` found, as people and machines read it."""
