"""Rewrites a network into one that is equal in float and quantizes better."""
