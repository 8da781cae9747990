"""The stages: thin, each reading like the paragraph that describes it."""
