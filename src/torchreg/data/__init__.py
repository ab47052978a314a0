"""Tables in, matrices out.

- `table`: the `Table` that is trained on, `load_table` with its checks, and the real table from its pinned address;
- `table_files`: columns of CSV and Parquet files;
- `synthetic`: the synthetic table, whose sums are those of the real one;
- `standardizer`: features and parameters in the data's and in the model's units.
"""
