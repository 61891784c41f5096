"""Passes over a built model: they swap layers or wrap `block.forward`; the model itself knows none of them."""
