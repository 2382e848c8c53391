"""Which block and site costs how much, why, and what to do about it."""
