"""What is drawn of a run: a module a family of panels, a function a panel."""
