"""pipestill distils diffusion models into few-step students with measured quality, reproducibly."""

__version__ = "0.1.0"
