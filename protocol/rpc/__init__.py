"""Calls between peers: request ids, deadlines, cancellation and their limits. Methods are a service's business."""
