"""TorchScript files, which are programs: run where their code touches no files.

Networks of features are published so, NVIDIA's Inception and LPIPS among them.
"""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

ON_FILES = re.compile(rb"\b(?:torch|aten|ops\.\w+)\.(\w*(?:save|load|from_file)\w*)\(")
"""Calls of torch's own that read or write files, as TorchScript spells them."""
MOST_CODE = 1 << 24  # bytes; networks have some 100 kB


def load_script(path: Path, device: torch.device) -> Any:
    """The module of a TorchScript file on the device, in evaluation mode.

    Raises ValueError, naming the file, where it is none, or its code asks for files.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            code = [entry for entry in archive.infolist() if entry.filename.endswith(".py")]
            if sum(entry.file_size for entry in code) > MOST_CODE:
                raise ValueError(f"{path} is refused: its code is longer than any network's")
            asked = [call for entry in code for call in ON_FILES.findall(archive.read(entry))]
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is no TorchScript file") from error
    if asked:
        name = asked[0].decode(errors="replace")
        raise ValueError(f"{path} is refused: its code asks for torch.{name}, which is of files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is what such networks are published as
        try:
            return torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is no whole TorchScript file") from error
