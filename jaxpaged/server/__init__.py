"""The HTTP face: OpenAI's API over ``AsyncEngine``. Knows nothing of pages, devices or JAX."""
