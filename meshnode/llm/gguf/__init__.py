"""Model files: reading their headers, knowing what a model of that shape needs, cutting it by layers."""
