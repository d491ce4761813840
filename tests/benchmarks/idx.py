"""The IDX files of MNIST and its kin, raw or .gz."""

import gzip
from pathlib import Path

import numpy as np
import torch


def images(folder, part="train"):
    """The images of a folder, (N, H * W) in [0, 1]; ``part`` is "train" or "t10k".

    The files are named like train-images-idx3-ubyte, perhaps with .gz.
    """
    found = sorted(Path(folder).rglob(f"{part}-images*idx3-ubyte*"))
    if not found:
        raise SystemExit(f"no {part}-images-idx3-ubyte in {folder}: give a folder of IDX files")
    opened = gzip.open if found[0].suffix == ".gz" else open
    with opened(found[0], "rb") as file:
        magic, num, height, width = np.frombuffer(file.read(16), ">u4")
        assert magic == 2051, f"{found[0]} holds no images"
        pixels = np.frombuffer(file.read(), np.uint8).reshape(num, height * width)
    return torch.from_numpy(pixels / np.float32(255))
