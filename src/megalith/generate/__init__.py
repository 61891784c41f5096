"""Text from a model: loading it to read, decoding, prompts in and texts out."""
