"""Rewrites of float models, before they are prepared: what `cptv_ao.recipe` does."""
