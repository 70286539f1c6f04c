"""Archives of the data sets that torchvision knows: fetched, checked and unpacked."""

import io
import os
import sys
from contextlib import nullcontext, redirect_stderr
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

from dataset.base import DataError


def fetch(kind: type, data_folder: Path, download: bool) -> None:
    """Unpack a torchvision data set's archive, after downloading it where it is not there with the right MD5."""
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive

    archive, folder = data_folder / kind.filename, data_folder / kind.base_folder
    by_hand = f"get {kind.url} (MD5 {kind.tgz_md5}) and put it at {archive}"
    try:
        if not check_integrity(archive, kind.tgz_md5):
            if not download:
                files = kind.train_list + kind.test_list
                wrong = next((name for name, md5 in files if not check_integrity(folder / name, md5)), "")
                raise DataError(f"{folder / wrong} is missing or damaged, and may not be downloaded: {by_hand}")
            data_folder.mkdir(parents=True, exist_ok=True)
            progress = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
            # A folder of its own: a broken download leaves nothing, and two runs do not write one file.
            with TemporaryDirectory(dir=data_folder) as partial, progress:
                download_url(kind.url, partial, kind.filename, kind.tgz_md5)
                os.replace(Path(partial) / kind.filename, archive)
        extract_archive(archive, data_folder)
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(f"{kind.__name__} could not be fetched into {data_folder} ({error}): {by_hand}") from error
