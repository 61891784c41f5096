"""Optimizer pieces: config sections, schedules, parameter groups, AdamW, clipping, loss scaling."""
