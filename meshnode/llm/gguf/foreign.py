"""Which other kind of file this is, by its name or its first bytes: people pull what a page offers first.

None of them is ever opened. Pickles run code when they are read, archives hold paths, and llama.cpp takes neither.
"""

from typing import Final

NAME_ENDINGS: Final = {
    ".safetensors": "weights in safetensors",
    ".pt": "a PyTorch checkpoint, a pickle that can run code",
    ".pth": "a PyTorch checkpoint, a pickle that can run code",
    ".ckpt": "a PyTorch checkpoint, a pickle that can run code",
    ".bin": "weights of PyTorch, mostly a pickle that can run code",
    ".pkl": "a pickle, which can run code",
    ".pickle": "a pickle, which can run code",
    ".onnx": "an ONNX model",
    ".h5": "an HDF5 file",
    ".tflite": "a TensorFlow Lite model",
    ".zip": "a zip archive",
    ".tar": "a tar archive",
    ".tgz": "a compressed archive",
    ".gz": "a compressed file",
    ".xz": "a compressed file",
    ".bz2": "a compressed file",
    ".zst": "a compressed file",
    ".7z": "an archive",
    ".rar": "an archive",
}
"""What is offered beside GGUF files, by the end of its name."""

ADVICE: Final = (
    "Only GGUF files are taken: look for a GGUF of the same model (`meshnode models --all` lists some), or make one "
    "with llama.cpp's convert_hf_to_gguf.py."
)

_MAGICS: Final = (
    (0, b"PK\x03\x04", "a zip archive, as PyTorch's checkpoints are: pickles that can run code"),
    (0, b"PK\x05\x06", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"\xfd7zXZ\x00", "an xz file"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"\x28\xb5\x2f\xfd", "a zstandard file"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!", "a rar archive"),
    (257, b"ustar", "a tar archive"),
    (8, b'{"', "weights in safetensors"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"lmgg", "a GGML file of before GGUF"),
    (0, b"fmgg", "a GGML file of before GGUF"),
    (0, b"tjgg", "a GGML file of before GGUF"),
    (0, b"\x80\x02", "a pickle, which can run code"),
    (0, b"\x80\x03", "a pickle, which can run code"),
    (0, b"\x80\x04", "a pickle, which can run code"),
    (0, b"\x80\x05", "a pickle, which can run code"),
    (0, b"version https://git-lfs", "a pointer of git-lfs; the file itself was not downloaded"),
    (0, b"<", "a web page"),
)


def kind_of_name(name: str) -> str | None:
    """What a file of this name is; None for a GGUF and for what nobody knows."""
    return next((kind for ending, kind in NAME_ENDINGS.items() if name.lower().endswith(ending)), None)


def kind_of_bytes(beginning: bytes) -> str | None:
    """What a file that begins so is."""
    return next((kind for at, magic, kind in _MAGICS if beginning[at : at + len(magic)] == magic), None)
