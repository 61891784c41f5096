"""Checkpoints: the native format, its retention, and (later) the converters of foreign formats."""
