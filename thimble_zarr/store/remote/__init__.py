"""A store copied to a server, and back."""
