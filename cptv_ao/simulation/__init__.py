"""The float twin: the kernels' arithmetic in float, differentiable, on any device."""
