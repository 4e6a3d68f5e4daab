"""What is plainly wrong with files of weights, seen without reading their numbers."""

import hashlib
import json
import zipfile
from pathlib import Path

RECORD = ".fetched.json"
"""Beside fetched files: their sizes and SHA-256 by name."""
CONFIGS = ("config.json", "open_clip_config.json", "model_index.json")
VOCABULARIES = ("vocab.txt", "tokenizer.json")
KINDS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt")
BLOCK = 1 << 22


def fault(path: Path) -> str:
    """-> what is wrong with a file or a folder of weights, "" for nothing that can be seen."""
    if not path.is_dir():
        return file_fault(path)
    parts = sorted(p for p in path.rglob("*") if p.suffix in KINDS and p.is_file())
    told = [f"{part.relative_to(path)}: {found}" for part in parts if (found := file_fault(part))]
    there = {p.name for p in path.iterdir()}
    if parts and not there.isdisjoint(CONFIGS):
        return told[0] if told else ""
    if not there.isdisjoint(VOCABULARIES):
        return ""
    wanted = "config.json" if parts else "weights (.safetensors or .bin) or vocabulary"
    return f"the folder has no {wanted}"


def file_fault(path: Path) -> str:
    """-> the same of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(max(0, size - 1))
        last = file.read(1)
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file: git lfs pull"
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "it is a web page that was saved instead of the file"
    cut = (
        safetensors_cut(path, size)
        or (head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path))
        or (path.suffix == ".pkl" and last != b".")
    )
    return f"it is cut short ({size} bytes), or broken" if cut else ""


def safetensors_cut(path: Path, size: int) -> bool:
    """Whether a .safetensors file does not hold what its header says."""
    if path.suffix != ".safetensors":
        return False
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            return True
        try:
            header = json.loads(file.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        except (ValueError, TypeError, LookupError, AttributeError):
            return True
    return max(ends, default=0) + 8 + length != size


def changed(path: Path, *, thoroughly: bool) -> str:
    """-> how a file differs from what was fetched, "" where it does not or was not fetched.

    The size is compared, and thoroughly the SHA-256 as well.
    """
    record = recorded(path.parent).get(path.name)
    if record is None:
        return ""
    size = path.stat().st_size
    if size != record["size"]:
        return f"it has {size} bytes, but {record['size']} were fetched"
    if thoroughly and sha256(path) != record["sha256"]:
        return "its SHA-256 is not that of what was fetched"
    return ""


def recorded(folder: Path) -> dict[str, dict[str, object]]:
    """-> the record of a folder; empty where there is none that can be read."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sha256(path: Path) -> str:
    """-> the hash of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def bytes_of(path: Path) -> int:
    """-> the size of a file, or of the files in a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
