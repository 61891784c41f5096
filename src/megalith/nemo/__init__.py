"""NeMo's words for models and trainers: classes with `restore_from`, `save_to`, `from_pretrained`, and a Trainer around them."""
