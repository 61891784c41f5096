"""Configuration: files and overrides → one checked tree of sections. Each section lives with its owner."""
