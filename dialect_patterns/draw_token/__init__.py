"""DrawToken (of our own): the next token, drawn from logits as settings say that are given with every call."""
