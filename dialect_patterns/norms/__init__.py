"""The normalisations: RMS, skip and gated RMS, L2 (LpNormalization)."""
