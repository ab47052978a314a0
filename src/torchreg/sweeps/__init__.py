"""Many runs that differ in one thing, batch size or learning rate, beside what is predicted of them.

A sweep is a folder: `sweep.json` (its kind, configuration and trials), `trials/<name>/` (the record of one run each),
and `trials.csv` and `curves.csv`, which are computed from the records. A finished trial is not run again.
"""
