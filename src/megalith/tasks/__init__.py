"""Objective, data and metrics of each task, and the root configurations."""
