"""The native HTTP of models, generations and chats. `mount` has the whole; each other module one family of paths."""
