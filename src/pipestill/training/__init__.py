"""The training loop that teachers and students share, with its state, losses and averages."""
