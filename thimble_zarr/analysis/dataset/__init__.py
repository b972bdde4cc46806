"""Recordings as xarray datasets, everything big lazy."""
