"""What the benchmark measures, one file each."""
