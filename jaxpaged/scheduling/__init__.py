"""The host floor: requests, pages, plans and the scheduler. Plain Python; nothing here imports JAX."""
