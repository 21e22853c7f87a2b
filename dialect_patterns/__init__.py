"""linattn.dialect_patterns: MLIR rewrite patterns that turn ONNX operators into linalg and scf (MLIR in, MLIR out)."""
