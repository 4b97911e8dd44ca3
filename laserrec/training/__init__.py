"""The trainer: epochs, checkpoints and curves of any method."""
