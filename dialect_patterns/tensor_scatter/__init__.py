"""The TensorScatter operator of opset 24: rows written into a cache of fixed size."""
