"""Unpack what tests compare with from the source package of llama-cpp-python: llama_source.py ARCHIVE FOLDER."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

WANTED = ("conversion/", "gguf-py/", "models/templates/", "models/ggml-vocab-", "src/llama-vocab.cpp")


def unpack(archive: Path, folder: Path) -> int:
    """Files under vendor/llama.cpp that are wanted; how many there were."""
    n = 0
    with tarfile.open(archive) as files:
        for member in files:
            _, _, path = member.name.partition("/vendor/llama.cpp/")
            if path.startswith(WANTED) and member.isfile() and ".." not in path:
                data = files.extractfile(member)
                assert data is not None
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data.read())
                n += 1
    return n


if __name__ == "__main__":
    if unpack(Path(sys.argv[1]), Path(sys.argv[2])) == 0:
        sys.exit(f"{sys.argv[1]}: has no vendor/llama.cpp; is it the source package of llama-cpp-python?")
