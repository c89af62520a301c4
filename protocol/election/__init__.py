"""Who coordinates, in which term; leases, the electorate, and the fence against older terms."""
