"""Published models and vocabularies: their names, where they lie on this machine, and how they come here."""
