"""SelectiveScan: Mamba-1's recurrence, with a decay of its own for each channel and element of the state."""
