"""Between messages and text: chat templates, tool calls, forced formats, and the assembly of what a model says.

All is pure but the worker process, in which a stranger's template runs, and its client.
"""
