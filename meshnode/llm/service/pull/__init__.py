"""Getting a model's bytes: what a reference means, where its bytes are, and fetching them so that nothing is lost."""
