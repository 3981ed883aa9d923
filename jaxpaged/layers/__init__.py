"""Norms, rotations, projections and the attention block, shared by all families."""
