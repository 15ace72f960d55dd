"""A pytest plugin that builds a language model step by step and gates what each step promised."""
