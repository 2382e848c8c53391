"""Values and pure functions: sites, qparams, batches, losses, config, outcome, errors. Runs no model."""
