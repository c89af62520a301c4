"""DeepSeek's marks, written so that a line of a test shows what it says."""

import re


def deepseek(said: str) -> str:
    """`<|tool_sep|>` and its like as the models write them: with a full-width bar and a lower block."""
    return re.sub(r"<\|(tool_[a-z_]*)\|>", lambda found: f"<｜{found.group(1).replace('_', '▁')}｜>", said)
