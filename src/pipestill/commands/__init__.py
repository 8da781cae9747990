"""Commands that look after the pipeline: what is not a stage."""
