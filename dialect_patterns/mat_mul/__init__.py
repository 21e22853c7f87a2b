"""MatMul (ai.onnx): products with weight matrices on GPUs; everything else is left to IREE's importer."""
