"""From logits to tokens: how one is chosen, and the loop over a session's steps."""
