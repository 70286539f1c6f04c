"""Downloads by torchvision, with errors that say what to do by hand."""

import io
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from http.client import HTTPException
from pathlib import Path

from dataset.base import DataError


@contextmanager
def explain_download(url: str, md5: str, archive: Path) -> Iterator[None]:
    """Turn torchvision's errors into a DataError that says where to get the archive; no progress bar in log files."""
    progress = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with progress:
            yield
    except (OSError, RuntimeError, ValueError, HTTPException, zipfile.BadZipFile) as error:
        by_hand = f"get {url} (MD5 {md5}) and put it at {archive}"
        raise DataError(f"{archive.parent} has no complete copy of the data set ({error}): {by_hand}") from error


def fetch(cls: type, data_folder: Path, download: bool) -> None:
    """Unpack the archive of a torchvision data set, after downloading it if that is needed and allowed."""
    from torchvision.datasets.utils import check_integrity  # comes with cls, so no second more

    archive = data_folder / cls.filename
    with explain_download(cls.url, cls.tgz_md5, archive):
        cls(data_folder, download=download or check_integrity(archive, cls.tgz_md5))
