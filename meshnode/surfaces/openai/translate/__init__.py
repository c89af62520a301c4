"""Pure translation: their requests into ours, our events into their answers. One file for each endpoint."""
