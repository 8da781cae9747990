"""Diffusion mathematics in one coordinate system, x = x0 + sigma * eps: pure functions of tensors."""
