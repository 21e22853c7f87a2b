"""From the specialised graph through MLIR and IREE to executables and parameters."""
