"""The real table, fetched from its pinned address."""

from __future__ import annotations

from pathlib import Path

AMES_URL = (
    "https://raw.githubusercontent.com/argonne-lcf/ai-science-training-series/"
    "e7d9e727010650b0b8757d0bcbc3ef41c96681d7/old/2024-Spring/01_intro_AI_on_Supercomputer/"
    "slimmed_realestate_data.csv"
)
AMES_SHA256 = "5e7578a8e9bc0f1e2eac9711621f4d0d129e9fe36e3f4e655947a0652b3b05cc"


def fetch_ames(url: str = AMES_URL, sha256: str = AMES_SHA256) -> Path:
    """The path of the real table: downloaded once, its checksum verified, then cached.

    The cache folder is the user's (TORCHREG_CACHE overrides it). Raises `ValueError` when it cannot be fetched.
    """
    import pooch
    import requests  # pooch's own transport

    pooch.get_logger().setLevel("WARNING")
    folder, file = pooch.os_cache("torchreg"), url.rpartition("/")[2]
    cache = pooch.create(folder, base_url="", registry={file: sha256}, urls={file: url}, env="TORCHREG_CACHE")
    try:
        return Path(cache.fetch(file))
    except (requests.RequestException, OSError) as error:
        raise ValueError(
            f"data is ames: its table cannot be fetched from {url} ({type(error).__name__}); run `torchreg data fetch` "
            f"where there is a network (on a compute node set https_proxy), or use --data synthetic"
        ) from error
    except ValueError as error:
        raise ValueError(f"data is ames: the file at {url} is not the table: {error}") from error
