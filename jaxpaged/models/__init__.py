"""One short file per model family over shared layers, and the registry of them."""
