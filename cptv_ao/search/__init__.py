"""Finds better scales: strategies (vectors only), proposals (from the twin), the loop, its checkpoint."""
