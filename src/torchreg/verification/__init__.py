"""A known-answer test of a distributed stack: does it train correctly, and if not, what is wrong?

- `verify`: all checks, in order, and injected defects, which show that the checks can fail;
- `topology`, `collectives`, `known_answers`, `file_checks`: the checks;
- `checks`: what a check is, how ranks agree on its outcome, and the table.
"""
