"""Pickles from elsewhere, read without running anything that they ask for."""
