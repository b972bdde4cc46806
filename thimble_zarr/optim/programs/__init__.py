"""Portable programs: an optimizer's step with the same bits on any machine, without torch."""
