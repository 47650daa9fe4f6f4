"""What kind of file it is, read off its first bytes, and what its owner can do with it."""

import zipfile
from typing import IO

from manual_lstm.check.pickles import is_pickle

_SAVE = "load it with the package that made it, and save the model's state_dict() with torch.save"
_HEADS = {
    b"\x89HDF\r\n\x1a\n": f"is HDF5, as Keras writes it: {_SAVE}",
    b"GGUF": f"is GGUF: {_SAVE}",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"BZh": "is compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed with xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it first",
    b"7z\xbc\xaf": "is a 7z archive: unpack it first",
    b"ORBC": f"is an Orbax checkpoint: {_SAVE}",
}
_ENDINGS = {
    ".onnx": f"is an ONNX model: {_SAVE}",
    ".mlmodel": f"is a Core ML model: {_SAVE}",
    ".tflite": f"is a TensorFlow Lite model: {_SAVE}",
    ".pb": f"is a TensorFlow graph: {_SAVE}",
    ".h5": f"is a Keras file: {_SAVE}",
    ".index": f"is a part of a TensorFlow checkpoint: {_SAVE}",
    ".msgpack": f"is a Flax checkpoint: {_SAVE}",
    ".distcp": "is a part of a distributed checkpoint: join its parts with dcp_to_torch_save of "
    "torch.distributed.checkpoint.format_utils",
}


def describe_format(file: IO[bytes], ending: str) -> str | None:
    """Say in one line what a file is that holds no checkpoint of torch; ``None`` if it is not known.

    Args:
        file: the file, at its beginning.
        ending: that of its name, such as ``".onnx"``, in lower case.
    """
    head = file.read(1024)
    file.seek(0)
    if not head:
        return "is empty"
    for start, what in _HEADS.items():
        if head.startswith(start):
            return what
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it first"
    if zipfile.is_zipfile(file):
        return _of_zip(file)
    file.seek(0)
    if is_pickle(file):
        return None
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    if b"onnx" in head[:64] or b"pytorch" in head[:32]:
        return _ENDINGS[".onnx"]
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself: run git lfs pull"
    if head.lstrip()[:1] == b"<" and _is_text(head):
        return "is a page of HTML or XML, not a checkpoint: download the file itself"
    if _is_text(head):
        return "is text, not a checkpoint"
    return f"is not a checkpoint of a known format, or is damaged: {_SAVE}"


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return False
        text = head[: error.start].decode("utf-8")
    return len(text) > 1 and all(char.isprintable() or char in "\r\n\t" for char in text)


def _of_zip(file: IO[bytes]) -> str | None:
    try:
        names = zipfile.ZipFile(file).namelist()
    except Exception:  # a damaged archive may raise anything
        return None
    parts = {part for name in names for part in name.split("/")}
    if "constants.pkl" in parts or any(name.endswith(".ts") for name in names):
        return (
            "is a TorchScript archive, not a checkpoint: load it with torch.jit, save its state_dict()"
        )
    if parts & {"serialized_exported_program.json", "archive_format", "models"} and not any(
        name.endswith("/data.pkl") for name in names
    ):
        return "is a program of torch.export (.pt2): save the model's state_dict() instead"
    if ".data" in parts and "extern_modules" in parts:
        return "is an archive of torch.package, which holds code: save the model's state_dict() instead"
    if "model.weights.h5" in parts or {"config.json", "metadata.json"} <= parts:
        return f"is a Keras archive: {_SAVE}"
    if any(name.endswith(".mlmodel") for name in names):
        return _ENDINGS[".mlmodel"]
    if any(part == "data.pkl" for part in parts):
        return None
    return "is a zip archive of other files, not a checkpoint: unpack it first"
