"""Which node holds which layers of a model, and one generation session over them."""
