"""The viewer: the report's panels on a local server, live, with what a file cannot do."""
