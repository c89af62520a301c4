"""OpenAI's HTTP interface under /v1: chat completions, completions, responses, embeddings, models."""
