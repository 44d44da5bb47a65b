"""Loads that the ranks of a process group share."""
