"""Why rows do not follow from the rows before."""
