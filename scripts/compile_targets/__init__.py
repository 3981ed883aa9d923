"""Compiles kernels and whole engine steps for accelerators that are not there, and says what the compilers made of them.

``targets`` names the chips, ``table`` the rows (a program and a shape each), ``programs`` turns a row into a function and abstract
arguments, ``measure`` compiles it and reads the compiler's reports, ``worker`` does that for many rows in one process,
``session`` runs the workers, ``reports`` reads what compilers print, ``report`` writes the table. Only ``programs``, ``measure`` and
``worker`` load jax, so that a parent process stays light and its own jax settings have no say. Nothing in ``jaxpaged`` or
``pallas_kernels`` imports this package.
"""
