"""What paging saves: workloads replayed through the real scheduler, and through contiguous reservation, without a device or weights."""
