"""Building the llm subsystem: what it stands on (`ground`), and how its parts are put together (`assembly`)."""
