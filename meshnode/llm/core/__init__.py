"""The pure decisions of the llm subsystem."""
