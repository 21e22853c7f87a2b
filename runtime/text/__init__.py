"""Text in and text out: the tokenizer of a model, its chat template and its defaults, around a session.

Needs the packages of the extra `text` (tokenizers, jinja2); nothing else in linattn.runtime does.
"""
