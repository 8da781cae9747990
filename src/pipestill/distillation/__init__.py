"""DMD2 (Yin et al. 2024): few-step students by distribution matching, backward simulation and a GAN."""
