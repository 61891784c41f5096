"""What other programs write: their folders, their names, their tables."""
