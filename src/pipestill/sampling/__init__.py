"""Sampling: fixed blocks of items over ranks, written while the next one computes, published as one artefact."""
