"""The local HTTP API: server, guard, routing, rendering. What an answer says is the subsystems' business."""
