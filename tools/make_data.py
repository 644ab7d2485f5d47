"""Make the data files that ship in ``efftrain/data/files`` from the packages they come from.

Run once, by hand, when a file is added or its form changes::

    pip download --no-deps seglearn==1.2.5 scikit-learn
    python tools/make_data.py seglearn-1.2.5-*.whl scikit_learn-*.whl

Prints the quantization error of the watch data and the size and SHA-256 of every file, which go into
``efftrain/data/shipped.py``. Nothing here is imported by the library.

The watch data is a pickled object array upstream. It is read by an unpickler that knows four harmless constructors and
refuses everything else, so that no code of the file runs; what ships holds no pickle.
"""

import argparse
import csv
import gzip
import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np

ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
    (f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")
}


class ArrayUnpickler(pickle.Unpickler):
    """Builds lists, dicts and NumPy arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        """The constructor, when it is one of ``ALLOWED``.

        Raises:
            pickle.UnpicklingError: The file asks for anything else.
        """
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which is not allowed")


def make_watch(wheel: Path, target: Path) -> None:
    """Whole recordings as int16, one scale a channel: about 2 MB where the windows as fp32 would be 11 MB."""
    raw = io.BytesIO(zipfile.ZipFile(wheel).read("seglearn/data/watch_dataset.npy"))
    np.lib.format.read_magic(raw)
    np.lib.format.read_array_header_1_0(raw)
    source = ArrayUnpickler(raw, encoding="latin1").load().item()
    samples = np.concatenate(source["X"])
    # The scale is rounded up to fp32 so that the largest value cannot exceed 32767 steps of it.
    scale = np.nextafter((np.abs(samples).max(axis=0) / 32767).astype(np.float32), np.float32(np.inf))
    quantized = np.rint(samples / scale.astype(np.float64))
    assert np.abs(quantized).max() <= 32767
    error = samples - quantized * scale.astype(np.float64)
    print("watch: largest error / standard deviation, per channel:", np.abs(error).max(0) / samples.std(0))
    print("watch: rms error / standard deviation, per channel:    ", error.std(0) / samples.std(0))
    np.savez_compressed(
        target,
        samples=np.ascontiguousarray(quantized.astype(np.int16).T),
        scale=scale,
        recording_lengths=np.array([len(x) for x in source["X"]], np.int32),
        labels=np.asarray(source["y"], np.uint8),
        people=np.asarray(source["subject"], np.uint8),
        sides=np.asarray(source["side"], np.uint8),
    )


def make_digits(wheel: Path, target: Path) -> None:
    """1,797 images of 8x8 pixels in 0..16, and their labels, as uint8."""
    text = gzip.decompress(zipfile.ZipFile(wheel).read("sklearn/datasets/data/digits.csv.gz")).decode("ascii")
    rows = np.array([[float(cell) for cell in row] for row in csv.reader(io.StringIO(text)) if row])
    assert rows.shape == (1797, 65)
    assert (rows == rows.astype(np.uint8)).all()
    np.savez_compressed(
        target, images=rows[:, :64].reshape(-1, 8, 8).astype(np.uint8), labels=rows[:, 64].astype(np.uint8)
    )


def main() -> None:
    """Parse the arguments, write both files, print their facts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("seglearn_wheel", type=Path)
    parser.add_argument("sklearn_wheel", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "efftrain" / "data" / "files")
    arguments = parser.parse_args()
    make_watch(arguments.seglearn_wheel, arguments.out / "watch.npz")
    make_digits(arguments.sklearn_wheel, arguments.out / "digits.npz")
    for name in ("watch.npz", "digits.npz"):
        data = (arguments.out / name).read_bytes()
        print(f"{name}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
