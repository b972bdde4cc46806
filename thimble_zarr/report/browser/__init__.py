"""Panels in a browser: Bokeh draws them, for the report and the viewer."""
