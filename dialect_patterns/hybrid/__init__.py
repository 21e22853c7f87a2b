"""The operators that exporters put around the two state operators, one file an operator."""
