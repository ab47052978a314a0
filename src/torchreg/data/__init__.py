"""Tables in, matrices out.

- `table`: the `Table` that is trained on, `load_table` with its checks, the real table from its pinned address, and the
  `Standardizer` between the data's and the model's units;
- `table_files`: columns of CSV and Parquet files;
- `synthetic`: the synthetic table, whose sums are those of the real one.
"""
