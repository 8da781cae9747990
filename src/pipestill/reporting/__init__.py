"""The report: figures gathered from artefacts, charts, and one self-contained page."""
