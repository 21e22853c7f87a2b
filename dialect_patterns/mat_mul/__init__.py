"""MatMul (ai.onnx): products with weight matrices; everything else is left to IREE's importer."""
