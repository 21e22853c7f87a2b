"""GatherBlockQuantized (com.microsoft): rows of a table of block-quantised weights, dequantised as they are read."""
