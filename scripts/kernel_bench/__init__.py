"""Times paged attention beside its peers, for ``scripts/bench_kernels.py``.

``cases`` holds the shapes and makes their data, ``timing`` turns calls into seconds, ``contenders`` are our implementations and jax's
own, ``torch_peers`` and ``flashinfer_peers`` those of optional packages, each in a module that is loaded only where its package is.
"""
