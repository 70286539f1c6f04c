"""One thread a process: two workers share two cores, and threads that wait for each other cost far more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    """How much hostile input there was."""
    passed = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    counts = [n for report in passed for key, n in report.user_properties if key == "hostile"]
    if counts:
        refused, read = map(sum, zip(*counts, strict=True))
        terminalreporter.line(f"hostile input: {refused + read:,} cases, {refused:,} refused, {read:,} read")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A data set of three colours: 3 x 22 training and 3 x 4 test images, 32x32."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, n in (("train", 22), ("test", 4)):
        for c, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = rng.integers(0, 160, (32, 32, 3), dtype=np.uint8)
                image[..., c] += 60
                Image.fromarray(image).save(root / split / name / f"{i}.png")
    return root
