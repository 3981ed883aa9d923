"""Attention and page kernels over a paged KV pool. Each kernel is a folder: a plain reference that is the meaning, and fast siblings."""
