"""Measuring images against real ones: extractors, moments, metrics and the reference that they are measured against."""
