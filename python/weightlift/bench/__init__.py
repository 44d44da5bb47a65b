"""Measuring: processes, conditions, contenders, tables and plots."""
