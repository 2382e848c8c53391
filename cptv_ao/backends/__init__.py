"""Reads and writes the scales of each form of quantized graph: lowered FX, reference FX, PT2E."""
