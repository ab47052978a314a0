"""If a bad table is trained on, every number after it is wrong; if the message is poor, a user is stuck."""

import hashlib
import http.server
import os
import resource
import signal
import sys
import threading
from dataclasses import replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchreg.cli import main
from torchreg.data.synthetic import make_houses
from torchreg.data.table import AMES_SHA256, Standardizer, Table, fetch_ames, load_table, write_table

from ..conftest import REAL_TABLE

SIX_SUMS = (551, 775_791, 87_177_171, 136_013_443_019, 1_243_629_245, 15_770_786_472_947)


def six_sums(table):
    x, y = table.features[:, 0], table.target[:, 0]
    return (len(x), x.sum(), y.sum(), (x * y).sum(), (x * x).sum(), (y * y).sum())


@pytest.mark.parametrize("seed", range(5))
def test_the_synthetic_table_has_the_real_tables_six_sums(seed):
    table = load_table("synthetic", data_seed=seed)
    assert six_sums(table) == pytest.approx(SIX_SUMS, rel=1e-14)


def test_the_synthetic_table_looks_like_houses():
    x, y = make_houses(551, 1, 0)
    area = x[:, 0]
    assert area.min() > 300
    assert y.min() > 10_000
    assert np.mean((area - area.mean()) ** 3) > 0, "areas are skewed to the right"
    small = area < np.median(area)
    residual = y - np.polyval(np.polyfit(area, y, 1), area)
    assert residual[~small].std() > 1.3 * residual[small].std(), "the spread of prices grows with the area"


@pytest.mark.parametrize(("num_rows", "num_features"), [(20, 1), (100_000, 1), (5_000, 8), (30, 12)])
def test_the_synthetic_table_has_the_size_asked_for(num_rows, num_features):
    table = load_table("synthetic", num_rows=num_rows, num_features=num_features)
    assert table.features.shape == (num_rows, num_features)
    assert table.target.min() > 0
    assert table.target.mean() == pytest.approx(SIX_SUMS[2] / 551)


def test_too_few_synthetic_rows_are_refused():
    with pytest.raises(ValueError, match="num_features \\+ 2 = 6 rows"):
        load_table("synthetic", num_rows=5, num_features=4)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_written_table_is_read_back_to_the_last_bit(ending):
    table = load_table("synthetic", num_features=2)
    write_table(table, Path(f"houses.{ending}"))
    again = load_table(f"houses.{ending}", features=("GrLivArea", "Feature2"))
    assert again.fingerprint() == replace(table, definition="").fingerprint()


def test_the_lessons_file_needs_no_options():
    Path("lesson.csv").write_text(",SalePrice,GrLivArea\n1,208500,1710\n3,223500,1786\n6,143000,1362\n")
    table = load_table("lesson.csv")
    assert (table.feature_names, table.target_name) == (("GrLivArea",), "SalePrice")
    assert table.features.tolist() == [[1710], [1786], [1362]]
    assert table.target.tolist() == [[208500], [223500], [143000]]


@pytest.mark.parametrize(
    ("content", "options", "parts"),
    [
        ("", {}, ["empty"]),
        ("GrLivArea,SalePrice\n", {}, ["0 usable rows"]),
        ("GrLivArea,SalePrice\n1,2\n", {}, ["1 usable row:", "two or more"]),
        ("GrLivArea,SalePrice\n1,2\n1,3\n", {}, ["GrLivArea", "is 1 in every row"]),
        ("grlivarea,SalePrice\n1,2\n2,3\n", {}, ["features is 'GrLivArea'", "nearest names are 'grlivarea'"]),
        ("a,b\n1,2\n2,3\n", {}, ["'GrLivArea'", "its columns are 'a', 'b'"]),
        ("GrLivArea,SalePrice\n1,2\n2,big\n", {}, ["'SalePrice' is 'big' in row 2", "not a number"]),
        ("GrLivArea,SalePrice\n1,2\n,3\n2,\n", {}, ["2 of 3 rows", "row 2, column 'GrLivArea'", "--drop-missing"]),
        ("GrLivArea,SalePrice\n1,2\nnan,3\n2,4\n", {}, ["1 of 3 rows", "(NaN)"]),
        ("GrLivArea,SalePrice\n1,2\n2,-inf\n", {}, ["'SalePrice' is infinite in row 2"]),
        ("GrLivArea,SalePrice\n1,2\n2,3\n", {"features": ("SalePrice",)}, ["also a feature"]),
        ("GrLivArea,SalePrice\n1,2\n2,3\n", {"features": ("GrLivArea",) * 2}, ["each column once"]),
    ],
)
def test_a_table_that_cannot_be_trained_on_is_refused_in_one_line(content, options, parts):
    Path("bad.csv").write_text(content)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is checked below
        load_table("bad.csv", **options)
    message = str(refused.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("path", ["nowhere.csv", ".", "broken.parquet", "pipe.csv"])
def test_a_file_that_cannot_be_read_is_refused(path):
    Path("broken.parquet").write_bytes(b"no parquet")
    os.mkfifo("pipe.csv")
    with pytest.raises(ValueError, match=r"does not exist|is a folder|cannot be read|is no regular file"):
        load_table(path)


UNEVEN = {
    "thousands separators": "GrLivArea,SalePrice\n1682,183,398\n1500,170,100\n900,120,500\n",
    "thousands separators of both": "GrLivArea,SalePrice\n1,682,183,398\n1,500,170,100\n",
    "thousands separators after a text": "Town,GrLivArea,SalePrice\nAda,1,682,183398\nBell,1,500,170100\n",
    "thousands separators in one row": "GrLivArea,SalePrice\n682,183398\n1,500,170100\n",
    "currency": "GrLivArea,SalePrice\n1682,$183,398\n1500,$170,100\n",
    "currency first": "SalePrice,GrLivArea\n$183,398,1682\n$170,100,1500\n",
    "numbers for names": '"GrLivArea","SalePrice"\n"1",1682,183398\n"2",1500,170100\n',
    "names that occur twice": "GrLivArea,SalePrice\nAda,1682,183398\nAda,1500,170100\n",
    "separators at the end": "Town,GrLivArea,SalePrice\nAda,1682,183398,\nBell,1500,170100,\n",
    "a short row": "GrLivArea,SalePrice\n1682,183398\n1500\n900,120500\n",
    "a short row of other columns": "GrLivArea,SalePrice,Town\n1682,183398,Ada\n1500,170100\n",
    "a long row": "GrLivArea,SalePrice\n1682,183398\n1500,170100,7\n",
    "a comment": "# houses\nGrLivArea,SalePrice\n1682,183398\n1500,170100\n",
    "another separator below": "GrLivArea,SalePrice\n1682;183398\n1500;170100\n",
    "decimal commas": "GrLivArea,SalePrice\n1682,5,183398\n1500,5,170100\n",
}


@pytest.mark.parametrize("case", UNEVEN)
def test_a_row_with_more_or_fewer_fields_than_the_header_is_refused(case, capsys):
    """D1: pandas shifts or fills up such rows, and the line is fitted to other numbers than the file's."""
    content = UNEVEN[case]
    Path("houses.csv").write_text(content)
    rows = content.splitlines()
    separators = rows[0].count(",")
    line = next(number for number, row in enumerate(rows, start=1) if row.count(",") != separators)
    width = rows[line - 1].count(",") + 1
    assert main(["data", "show", "--data", "houses.csv", "--drop-missing"]) == 2
    fields = f"{width} field{'s' * (width != 1)}"
    assert f"line {line} has {fields}, and the header has {separators + 1}" in capsys.readouterr().err


REFUSED = {
    "D1 quoted thousands": (b'GrLivArea,SalePrice\n"1,682","183,398"\n900,120500\n', "is '1,682' in row 1"),
    "D1 decimal commas": (b"GrLivArea;SalePrice\n1682,5;183398\n1500;170100\n", "a decimal point"),
    "D1 truth values": (
        b"GrLivArea,SalePrice\nTrue,183398\nFalse,170100\n",
        "is 'True' in row 1, which is not a number",
    ),
    "D1 truth values with a hole": (b"GrLivArea,SalePrice\n,3\nTrue,183398\nFalse,170100\n", "is 'True' in row 2"),
    "D1 underscores": (b"GrLivArea,SalePrice\n1_682,183398\n900,120500\n", "is '1_682' in row 1"),
    "D1 digits of another script": ("GrLivArea,SalePrice\n١٢,183398\n900,120500\n".encode(), "is '١٢' in row 1"),
    "D1 another encoding": ("Größe,SalePrice\n1,2\n2,3\n".encode("latin-1"), "not text in UTF-8"),
    "D1 two bytes a letter": ("GrLivArea,SalePrice\n1,2\n2,3\n".encode("utf-16"), "not text in UTF-8"),
    "D4 names that differ": (b"house,SalePrice\n1,2\n2,3\n", "its columns are 'house', 'SalePrice', separated by ','"),
    "D4 blanks between": (
        b"GrLivArea SalePrice\n1 2\n2 3\n",
        "names are 'GrLivArea SalePrice', separated by ','",
    ),
    "D5 twice": (b"GrLivArea,SalePrice,GrLivArea\n1,2,3\n2,3,9\n", "2 columns of this name"),
    "D5 twice but for blanks": (b"GrLivArea,SalePrice, SalePrice\n1,2,3\n2,3,9\n", "target is 'SalePrice'"),
    "D5 the name that pandas makes": (b"GrLivArea,x,x,SalePrice\n1,2,3,4\n2,3,9,4\n", "features is 'x.1'"),
    "D3 blank lines": (b"\n  \n\n", "which is empty"),
    "D3 bytes": (bytes(range(256)), "not text in UTF-8"),
    "D3 an endless quotation": (b'GrLivArea,SalePrice\n1,"2\n2,3\n', "cannot be read or written as CSV"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_would_be_misread_is_refused(case, capsys):
    content, part = REFUSED[case]
    Path("houses.csv").write_bytes(content)
    options = ["--features", "x.1"] if "x.1" in part else []
    assert main(["data", "show", "--data", "houses.csv", *options]) == 2
    err = capsys.readouterr().err
    assert part in err
    assert len(err.splitlines()) == 1


READ = {
    "D1 row names": b'"GrLivArea","SalePrice"\n"Ada",1682,183398\n"Bell",900,120500\n',
    "D1 a separator at the end of every line": b"GrLivArea,SalePrice,\n1682,183398,\n900,120500,\n",
    "D1 a byte order mark and carriage returns": b"\xef\xbb\xbfGrLivArea,SalePrice\r\n1682,183398\r\n900,120500\r\n",
    "D1 carriage returns alone": b"GrLivArea,SalePrice\r1682,183398\r900,120500\r",
    "D1 blank lines and none at the end": b"\nGrLivArea,SalePrice\n1682,183398\n\n  \n900,120500",
    "D1 a quoted line end": b'Remark,GrLivArea,SalePrice\n"small,\nold",1682,183398\n,900,120500\n',
    "D4 blanks": b'GrLivArea , "SalePrice"\n1682, 183398\n900 ,"120500"\n',
    "D4 semicolons": b"GrLivArea;SalePrice\n1682;183398\n900;120500\n",
    "D4 tabs": b"GrLivArea\tSalePrice\tx\n1682\t183398\t\n900\t120500\t\n",
    "D4 bars": b"GrLivArea|SalePrice\n1682|183398\n900|120500\n",
    "D4 a comma in a name": b'"Area; total",GrLivArea,SalePrice\n1,1682,183398\n2,900,120500\n',
    "D5 columns that are not used": b"x,x,GrLivArea,SalePrice\n1,2,1682,183398\n2,3,900,120500\n",
}


@pytest.mark.parametrize("case", READ)
def test_the_same_two_houses_in_other_spellings_are_read(case):
    Path("houses.csv").write_bytes(READ[case])
    table = load_table("houses.csv", features=(" GrLivArea",), target="SalePrice ")
    assert table.features.tolist() == [[1682], [900]]
    assert table.target.tolist() == [[183398], [120500]]
    assert (table.feature_names, table.target_name) == (("GrLivArea",), "SalePrice")


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zip", "tar", "tar.gz", "zst"])
def test_compressed_files_are_read_whole_or_refused(ending, capsys):
    """D3: a file that was cut short must not be trained on, nor end in a traceback."""
    if ending == "zst":
        pytest.importorskip("zstandard")
    path = Path(f"houses.csv.{ending}")
    table = load_table("synthetic", num_rows=3000)
    write_table(table, path)
    assert load_table(str(path)).fingerprint() == replace(table, definition="").fingerprint()
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"GrLivArea,SalePrice\n1,2\n2,3\n", b"", whole[:3]):
        path.write_bytes(content)
        assert main(["data", "show", "--data", str(path)]) == 2
        err = capsys.readouterr().err
        assert str(path) in err
        assert len(err.splitlines()) == 1


PARQUET = {
    "dates": ([datetime(2020, 1, 1), None, datetime(2021, 1, 1)], "timestamp"),
    "days": ([date(2020, 1, 1), None, date(2021, 1, 1)], "date32"),
    "times": ([timedelta(1), None, timedelta(2)], "duration"),
    "truth values": ([True, None, False], "bool"),
    "text": (["1", None, "2"], "string"),
    "categories": (pa.array(["1", None, "2"]).dictionary_encode(), "string"),
    "lists": ([[1], None, [2]], "list"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_a_parquet_column_of_another_type_is_no_number(case, capsys):
    """D2: dates were trained on as nanoseconds since 1970, and a missing one as −9.2e18."""
    values, kind = PARQUET[case]
    pq.write_table(pa.table({"GrLivArea": values, "SalePrice": [1, 2, 4]}), "houses.parquet")
    assert main(["data", "show", "--data", "houses.parquet", "--drop-missing"]) == 2
    assert f"column 'GrLivArea' has the type {kind}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values",
    [
        pd.array([1, None, 2], dtype="Int64"),
        pd.array([1, None, 2], dtype="Float32"),
        [Decimal("1.0"), None, Decimal("2.0")],
        pa.array([1, None, 2], pa.uint8()).dictionary_encode(),
        np.array([1, np.nan, 2], np.float16),
    ],
    ids=["Int64", "Float32", "decimals", "categories of numbers", "float16"],
)
def test_every_parquet_type_of_numbers_is_read_with_its_missing_values(values):
    """D2."""
    pq.write_table(pa.table({" GrLivArea ": values, "GrLivArea.1": [0, 0, 0], "SalePrice": [3, 5, 8]}), "houses.pq")
    table = load_table("houses.pq", drop_missing=True)
    assert table.features.tolist() == [[1], [2]]
    assert (table.target.tolist(), table.num_dropped) == ([[3], [8]], 1)


def test_parquet_without_pyarrow_is_refused_with_the_remedy(monkeypatch):
    pq.write_table(pa.table({"GrLivArea": [1, 2], "SalePrice": [3, 5]}), "houses.parquet")
    table = load_table("houses.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"houses.parquet is Parquet, and pyarrow is not installed: pip install"):
        load_table("houses.parquet")
    with pytest.raises(ValueError, match=r"again.parquet is Parquet, and \w+ is not installed: pip install"):
        write_table(table, Path("again.parquet"))


def test_parquet_with_two_columns_of_one_name_is_refused(capsys):
    """D5."""
    names = ["GrLivArea", "SalePrice", "GrLivArea"]
    pq.write_table(pa.Table.from_arrays([pa.array([1, 2])] * 3, names=names), "houses.parquet")
    assert main(["data", "show", "--data", "houses.parquet"]) == 2
    assert "2 columns of this name" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [0.3, 0.99])
def test_a_cut_parquet_file_is_refused(cut, capsys):
    """D3."""
    write_table(load_table("synthetic"), Path("houses.parquet"))
    content = Path("houses.parquet").read_bytes()
    Path("houses.parquet").write_bytes(content[: int(cut * len(content))])
    assert main(["data", "show", "--data", "houses.parquet"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_only_the_columns_that_are_used_are_read(monkeypatch):
    """W7: a wide table is read where its two columns fit into the memory and the whole does not."""
    wide = {f"x{i}": np.arange(100_000.0) for i in range(60)}
    wide |= {"GrLivArea": np.arange(100_000.0), "SalePrice": np.arange(100_000.0)}
    pq.write_table(pa.table(wide), "wide.parquet", compression="none", use_dictionary=False)
    before = pa.total_allocated_bytes()
    tracked = pa.default_memory_pool()
    most = tracked.max_memory()
    load_table("wide.parquet")
    assert pa.total_allocated_bytes() - before < 10e6
    assert tracked.max_memory() - max(most, before) < 10e6, "all columns are 50 MB"


def test_a_table_that_could_not_be_written_whole_leaves_the_old_one(monkeypatch):
    """W7: a cut CSV would be read as a shorter table."""
    main(["data", "make", "--output", "made.csv", "--num-rows", "30"])
    before = Path("made.csv").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as on a full disk
    try:
        assert main(["data", "make", "--output", "made.csv", "--num-rows", "5000", "--overwrite"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert Path("made.csv").read_bytes() == before
    assert [path.name for path in Path().iterdir()] == ["made.csv"]


@pytest.mark.parametrize("output", ["nowhere/made.csv", "folder"])
def test_a_table_that_cannot_be_written_there_is_refused(output, capsys):
    """W7."""
    Path("folder").mkdir()
    assert main(["data", "make", "--output", output, "--overwrite"]) == 2
    assert f"output is {output}" in capsys.readouterr().err


def test_rows_with_missing_values_are_excluded_when_asked():
    Path("holes.csv").write_text("GrLivArea,SalePrice\n1,2\n,3\n2,4\n")
    table = load_table("holes.csv", drop_missing=True)
    assert (table.num_rows, table.num_dropped) == (2, 1)


FEATURES = [make_houses(50, 2, seed)[0] for seed in range(6)]


@given(weight=st.floats(-1e3, 1e3), bias=st.floats(-1e5, 1e5), x=st.sampled_from(FEATURES))
def test_standardised_parameters_are_the_same_line(weight, bias, x):
    standardizer = Standardizer.of(x, standardize=True)
    inside = standardizer.parameters_in(np.array([weight, -weight]), bias)
    np.testing.assert_allclose(
        standardizer.apply(x) @ inside[0] + inside[1], x @ [weight, -weight] + bias, rtol=1e-9, atol=1e-6
    )
    outside = standardizer.parameters_out(*inside)
    np.testing.assert_allclose([*outside[0], outside[1]], [weight, -weight, bias], rtol=1e-9, atol=1e-6)


@pytest.fixture
def web_table(tmp_path, monkeypatch):
    """A small table on a local web server, as its path and its address, and an empty cache."""
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "table.csv").write_bytes(b",SalePrice,GrLivArea\n1,208500,1710\n3,223500,1786\n")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("TORCHREG_CACHE", str(tmp_path / "cache"))
        yield folder / "table.csv", f"http://127.0.0.1:{server.server_port}/table.csv"
        server.shutdown()


def sha256_of(content):
    return hashlib.sha256(content).hexdigest()


def test_the_real_table_is_fetched_once_and_cached(web_table):
    path, url = web_table
    content = path.read_bytes()
    assert fetch_ames(url, sha256_of(content)).read_bytes() == content
    path.unlink()
    assert fetch_ames(url, sha256_of(content)).read_bytes() == content, "the second time nothing is fetched"


def test_a_table_with_another_checksum_is_refused(web_table):
    with pytest.raises(ValueError, match="is not the table"):
        fetch_ames(web_table[1])


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHREG_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"cannot be fetched.*--data synthetic"):
        fetch_ames("http://127.0.0.1:9/table.csv")  # the discard port: nobody listens


@pytest.mark.parametrize("path", [p for p in [REAL_TABLE] if p.is_file()])
def test_the_pinned_checksum_is_the_real_tables(path):
    assert sha256_of(path.read_bytes()) == AMES_SHA256
    assert six_sums(load_table(str(path))) == SIX_SUMS


def test_other_rows_have_another_fingerprint():
    x, y = make_houses(10, 1, 0)
    one = Table(x, y[:, None], ("a",), "b", "synthetic")
    two = Table(x[::-1], y[::-1, None], ("a",), "b", "synthetic")
    assert one.fingerprint() != two.fingerprint()


def test_the_synthetic_table_has_one_fingerprint_on_every_machine():
    # Seen between two machines: the last bits of the rows differed, and a checkpoint was refused on the other.
    table = load_table("synthetic", num_rows=60)
    elsewhere = replace(table, target=table.target * (1 + 2**-52))
    assert not np.array_equal(elsewhere.target, table.target)
    assert elsewhere.fingerprint() == table.fingerprint()
    assert load_table("synthetic", num_rows=61).fingerprint() != table.fingerprint()
    assert load_table("synthetic", num_rows=60, data_seed=1).fingerprint() != table.fingerprint()
