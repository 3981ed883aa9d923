"""One module per command of ``jaxpaged``; each has ``run(argv) -> exit code``."""
