"""What this machine is and how busy it is.

Parts: `profile` (what never changes), `host` (CPU, memory, disk, battery), `memory` (limits of a container), `gpu`
(devices, told apart from how they are read), `nvidia` and `amd` (how they are read), `sampler` (once a second, all of
it). Telling other nodes about it is the heartbeats machine's business.
"""

from meshnode.kernel.resources.gpu import GpuDevice, GpuMonitor
from meshnode.kernel.resources.profile import Profile, ProfiledGpu
from meshnode.kernel.resources.sampler import Activity, IdleActivity, Reading, ResourceSampler

__all__ = [
    "Activity",
    "GpuDevice",
    "GpuMonitor",
    "IdleActivity",
    "Profile",
    "ProfiledGpu",
    "Reading",
    "ResourceSampler",
]
