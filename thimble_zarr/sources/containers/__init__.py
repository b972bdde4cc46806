"""Files that hold named arrays: which there are, and how a few rows are read."""
