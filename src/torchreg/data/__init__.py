"""Tables in, matrices out.

- `table`: the `Table` that is trained on, and `load_table` with its checks;
- `table_files`: columns of CSV and Parquet files;
- `fetching`: the real table, from its pinned address;
- `synthetic`: the synthetic table, whose sums are those of the real one;
- `standardizer`: features and parameters in the data's and in the model's units.
"""
