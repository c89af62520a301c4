"""What the llm subsystem answers to peers."""
