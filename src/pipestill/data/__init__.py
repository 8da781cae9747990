"""Images on their way to a network: sources, validation, the store, splits, order and the loader."""
