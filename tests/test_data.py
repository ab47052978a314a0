"""If a bad table is trained on, every number after it is wrong; if the message is poor, a user is stuck."""

import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchreg import data
from torchreg.builtin import make_houses
from torchreg.data import Standardizer, Table, load_table, write_table

from .conftest import REAL_TABLE

SIX_SUMS = (551, 775_791, 87_177_171, 136_013_443_019, 1_243_629_245, 15_770_786_472_947)


def six_sums(table):
    x, y = table.features[:, 0], table.target[:, 0]
    return (len(x), x.sum(), y.sum(), (x * y).sum(), (x * x).sum(), (y * y).sum())


@pytest.mark.parametrize("seed", range(5))
def test_builtin_data_has_the_real_tables_six_sums(seed):
    table = load_table("builtin", data_seed=seed)
    assert six_sums(table) == pytest.approx(SIX_SUMS, rel=1e-14)


def test_builtin_data_looks_like_houses():
    x, y = make_houses(551, 1, 0)
    area = x[:, 0]
    assert area.min() > 300
    assert y.min() > 10_000
    assert np.mean((area - area.mean()) ** 3) > 0, "areas are skewed to the right"
    small = area < np.median(area)
    residual = y - np.polyval(np.polyfit(area, y, 1), area)
    assert residual[~small].std() > 1.3 * residual[small].std(), "the spread of prices grows with the area"


@pytest.mark.parametrize(("num_rows", "num_features"), [(20, 1), (100_000, 1), (5_000, 8), (30, 12)])
def test_builtin_data_is_made_to_size(num_rows, num_features):
    table = load_table("builtin", num_rows=num_rows, num_features=num_features)
    assert table.features.shape == (num_rows, num_features)
    assert table.target.min() > 0
    assert table.target.mean() == pytest.approx(SIX_SUMS[2] / 551)


def test_too_few_builtin_rows_are_refused():
    with pytest.raises(ValueError, match="num_features \\+ 2 = 6 rows"):
        load_table("builtin", num_rows=5, num_features=4)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_written_table_is_read_back_to_the_last_bit(ending):
    table = load_table("builtin", num_features=2)
    write_table(table, Path(f"houses.{ending}"))
    again = load_table(f"houses.{ending}", features=("GrLivArea", "Feature2"))
    assert again.fingerprint() == table.fingerprint()


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
        ("grlivarea,SalePrice\n1,2\n2,3\n", {}, ["features is 'GrLivArea'", "nearest names are grlivarea"]),
        ("a,b\n1,2\n2,3\n", {}, ["'GrLivArea'", "its columns are a, b"]),
        ("GrLivArea,SalePrice\n1,2\n2,big\n", {}, ["'SalePrice' is 'big' in row 2", "not a number"]),
        ("GrLivArea,SalePrice\n1,2\n,3\n2,\n", {}, ["2 of 3 rows", "row 2, column 'GrLivArea'", "--drop-missing"]),
        ("GrLivArea,SalePrice\n1,2\nnan,3\n2,4\n", {}, ["1 of 3 rows", "(NaN)"]),
        ("GrLivArea,SalePrice\n1,2\n2,-inf\n", {}, ["'SalePrice' is infinite in row 2"]),
        ("GrLivArea,SalePrice\n1,2\n2,3\n", {"features": ("SalePrice",)}, ["also a feature"]),
        ("GrLivArea,SalePrice\n1,2\n2,3\n", {"features": ("GrLivArea",) * 2}, ["each column once"]),
        ("GrLivArea,SalePrice\n1,2,3\n1,2,3,4,5\n", {}, ["cannot be read as CSV"]),
    ],
)
def test_a_table_that_cannot_be_trained_on_is_refused_in_one_line(content, options, parts):
    Path("bad.csv").write_text(content)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is checked below
        load_table("bad.csv", **options)
    message = str(refused.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("path", ["nowhere.csv", ".", "broken.parquet", "binary.csv"])
def test_a_file_that_cannot_be_read_is_refused(path):
    Path("broken.parquet").write_bytes(b"no parquet")
    Path("binary.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match=r"does not exist|is a folder|cannot be read"):
        load_table(path)


def test_rows_with_missing_values_are_left_out_when_asked():
    Path("holes.csv").write_text("GrLivArea,SalePrice\n1,2\n,3\n2,4\n")
    table = load_table("holes.csv", drop_missing=True)
    assert (table.num_rows, table.num_dropped) == (2, 1)


@given(weight=st.floats(-1e3, 1e3), bias=st.floats(-1e5, 1e5), seed=st.integers(0, 5))
def test_standardised_parameters_are_the_same_line(weight, bias, seed):
    x, _ = make_houses(50, 2, seed)
    standardizer = Standardizer.of(x, standardize=True)
    inside = standardizer.parameters_in(np.array([weight, -weight]), bias)
    np.testing.assert_allclose(
        standardizer.apply(x) @ inside[0] + inside[1], x @ [weight, -weight] + bias, rtol=1e-9, atol=1e-6
    )
    outside = standardizer.parameters_out(*inside)
    np.testing.assert_allclose([*outside[0], outside[1]], [weight, -weight, bias], rtol=1e-9, atol=1e-6)


@pytest.fixture
def table_server(tmp_path, monkeypatch):
    """A local web server in the place of the table's pinned address, and an empty cache."""
    folder = tmp_path / "web"
    folder.mkdir()
    content = b",SalePrice,GrLivArea\n1,208500,1710\n3,223500,1786\n"
    (folder / "table.csv").write_bytes(content)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(data, "AMES_URL", f"http://127.0.0.1:{server.server_port}/table.csv")
        monkeypatch.setenv("TORCHREG_CACHE", str(tmp_path / "cache"))
        yield folder / "table.csv"
        server.shutdown()


def sha256_of(content):
    import hashlib

    return hashlib.sha256(content).hexdigest()


def test_the_real_table_is_fetched_once_and_cached(table_server, monkeypatch):
    monkeypatch.setattr(data, "AMES_SHA256", sha256_of(table_server.read_bytes()))
    assert load_table("ames").num_rows == 2
    table_server.unlink()
    assert load_table("ames").num_rows == 2, "the second time nothing is fetched"


def test_a_table_with_another_checksum_is_refused(table_server):
    with pytest.raises(ValueError, match="is not the table"):
        load_table("ames")


def test_without_a_network_the_error_says_what_to_do(table_server, monkeypatch):
    monkeypatch.setattr(data, "AMES_URL", "http://127.0.0.1:9/table.csv")  # the discard port: nobody listens
    with pytest.raises(ValueError, match=r"cannot be fetched.*--data builtin"):
        load_table("ames")


@pytest.mark.parametrize("path", [p for p in [REAL_TABLE] if p.is_file()])
def test_the_pinned_checksum_is_the_real_tables(path):
    assert sha256_of(path.read_bytes()) == data.AMES_SHA256
    assert six_sums(load_table(str(path))) == SIX_SUMS


def test_fingerprint_tells_tables_apart():
    x, y = make_houses(10, 1, 0)
    one = Table(x, y[:, None], ("a",), "b", "builtin")
    two = Table(x[::-1], y[::-1, None], ("a",), "b", "builtin")
    assert one.fingerprint() != two.fingerprint()
