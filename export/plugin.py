# SPDX-License-Identifier: Apache-2.0
"""The plugin that lets vLLM serve linear subblocks, as a wheel that lies beside the weights: `pip install` it once.

A wheel of two modules is a zip archive with a few lines about itself (PyPA's binary distribution format), so nothing
has to be built. The same bytes come out each time.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

_NAME, _VERSION = "refound_vllm", "1.0"
WHEEL = f"{_NAME}-{_VERSION}-py3-none-any.whl"
_MODULES = (f"{_NAME}.py", f"{_NAME}_layers.py")
_REMOTE = Path(__file__).parent / "remote"
_INFO = f"{_NAME}-{_VERSION}.dist-info"
_FILES = {
    f"{_INFO}/METADATA": f"Metadata-Version: 2.1\nName: refound-vllm\nVersion: {_VERSION}\n"
    "Summary: nemotron-nas with linear subblocks in vLLM\nLicense: Apache-2.0\n",
    f"{_INFO}/WHEEL": "Wheel-Version: 1.0\nGenerator: refound\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    f"{_INFO}/entry_points.txt": f"[vllm.general_plugins]\n{_NAME} = {_NAME}:register\n",
}


def write_plugin(directory: Path) -> Path:
    """Write the wheel into `directory`."""
    files = {name: (_REMOTE / name).read_text() for name in _MODULES} | _FILES
    lines = [f"{name},sha256={_digest(text)},{len(text.encode())}" for name, text in files.items()]
    files[f"{_INFO}/RECORD"] = "\n".join([*lines, f"{_INFO}/RECORD,,"]) + "\n"
    with zipfile.ZipFile(directory / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, text)
    return directory / WHEEL


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
