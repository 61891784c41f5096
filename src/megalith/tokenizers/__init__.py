"""Text to token ids and back: one protocol, byte-level BPE, Hugging Face files, training, and a fast path for corpora."""
