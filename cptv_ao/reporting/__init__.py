"""Shows results: table, page, plots, notes."""
