"""Scales for the whole model that are tried on the kernels before the block visits."""
