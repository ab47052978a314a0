"""Tables in, matrices out: files, the real table, the synthetic one."""
