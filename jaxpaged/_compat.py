"""What moved between the jax versions that are supported (0.10.2 on Python 3.11, newer on 3.12)."""
