"""Errors, settings, reports, dtypes and devices: used by every folder, imports none of them."""
