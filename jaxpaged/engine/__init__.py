"""Where host and device meet: batches, the runner, weights, text, the engine loop and its thread."""
