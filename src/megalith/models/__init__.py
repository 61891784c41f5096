"""Architectures built from `nn`: which layers, in which order, with which initial numbers."""
