"""Every setting of the agent: one frozen, validated tree from a TOML file, the environment and flags.

Parts: `tree` (the settings themselves), `sources` (where values come from), `resolve` (which one wins, and what is
wrong with it), `catalogue` (their documentation), `names` (node names). What a setting does is its subsystem's
business.
"""

from meshnode.settings.catalogue import Setting, catalogue, render_markdown
from meshnode.settings.names import node_name, normalise_name
from meshnode.settings.resolve import ResolvedSettings, SettingView, load_settings
from meshnode.settings.tree import Settings

__all__ = [
    "ResolvedSettings",
    "Setting",
    "SettingView",
    "Settings",
    "catalogue",
    "load_settings",
    "node_name",
    "normalise_name",
    "render_markdown",
]
