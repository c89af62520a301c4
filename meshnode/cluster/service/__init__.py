"""The cluster's verbs, split by what they are about: reading nodes, trust changes, invitations, pings."""
