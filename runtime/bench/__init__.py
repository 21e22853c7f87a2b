"""linattn-bench: measures the operators and whole models beside their peers; README.md has the method and the JSON.

Apart from numpy and iree-base-runtime everything is imported where it is needed, so that the runtime stays importable
without a compiler; what is missing is named in one line.
"""
