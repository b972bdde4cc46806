"""Anything that reads as a recording: our stores, and other people's files."""
