"""Tables in, matrices out.

- `table`: `load_table` with its checks, the real table, and the `Standardizer` between the data's and model's units;
- `table_files`: columns of CSV and Parquet files;
- `synthetic`: the synthetic table, whose sums are those of the real one.
"""
