"""Pure parts: submissions made into orders, tasks as they are shown."""
