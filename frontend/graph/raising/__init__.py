"""The two operators in other words: recurrences and convolutions that exporters spell out become the operators again.

A pass proves with algebra what a piece of the graph computes (``algebra.py``: sums of products over named axes) and
puts an operator there, or leaves the graph alone and says what stood in the way.
"""
