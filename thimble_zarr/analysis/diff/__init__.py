"""Where two runs first differ, and what came first."""
