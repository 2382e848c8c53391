"""Names, op kinds, node-by-node runs and cuts of torch.fx graphs. Knows no scale."""
