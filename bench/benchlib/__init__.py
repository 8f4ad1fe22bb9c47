"""What the benchmarks share: rows and their JSON, the machine, measured processes, the page cache, arrays."""
