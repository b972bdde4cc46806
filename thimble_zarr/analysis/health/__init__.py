"""What no fault makes, but a person wants to know of a run."""
