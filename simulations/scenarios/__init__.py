"""Scenarios, one file each: what is done to a mesh, what is measured, and the goal that each figure has to meet."""
