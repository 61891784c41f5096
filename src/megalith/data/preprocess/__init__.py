"""From raw text to token files: in parallel, in bounded memory, resumable, and the same bytes however it is run."""
