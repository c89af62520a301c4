"""The project's benchmarks: each measures one thing that the design puts a number on."""
