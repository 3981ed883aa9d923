"""A server process under trial: started, asked, measured and stopped, by ``scripts/soak.py`` and ``scripts/device_check.py``."""
