"""The verbs of the llm subsystem, a file for each family of them."""
