"""Builders and converters around Diffusers and Transformers networks, and model folders."""
