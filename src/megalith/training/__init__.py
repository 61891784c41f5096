"""The training run: Lightning's Trainer as the loop, and everything around it (files, metrics, saving, stopping)."""
