"""A store of ours on disk: what it holds, how it is written, read and checked."""
