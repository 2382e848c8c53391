"""The public verbs; orchestration only."""
