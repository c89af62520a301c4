"""The kernel: what every subsystem stands on (database, clock, data folder, supervisor, links, driver, errors).

It holds mechanism only. What a mesh decides lives in `protocol`, what a subsystem does lives in the subsystem.
"""
