"""What scales are worth: the teacher's outputs once, the tail of the graph per candidate, losses on both sets."""
