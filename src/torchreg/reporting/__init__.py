"""Reports on campaigns, from launch records alone.

- `analysis` turns records into the numbers of report.json, with `groups` (of comparable launches, and their points),
  `series` (with their models) and `verdict`, and writes it and the tables as CSV and Parquet
- `pages` and `tables` write the HTML and Markdown pages; the sentences are in `templates/`
- `comparison` compares a new campaign with an old one
"""
