"""The optimizer's arithmetic, on any array type."""
