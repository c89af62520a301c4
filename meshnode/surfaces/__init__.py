"""The interfaces of other systems over the services of this one."""
