"""The engine: windows of a recording, computed in pieces that fit the memory."""
