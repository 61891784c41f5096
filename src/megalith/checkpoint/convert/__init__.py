"""From one format to another: read lazily, written tensor by tensor, compared by its logits, published at once."""
