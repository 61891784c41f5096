"""Numbers of a model: perplexity, WikiText, LAMBADA, and the n-gram models that it must beat."""
