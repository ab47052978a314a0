"""Tables in, matrices out: the synthetic table, the real one, or a file of the user's."""
