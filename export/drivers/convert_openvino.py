# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's representation of Hugging Face directories: `convert_openvino.py SOURCE TO [SOURCE TO …]`.

optimum-intel makes the graph, float32 as the weights are; openvino-tokenizers the tokenizer, where there is one.
"""

import sys
from pathlib import Path


def convert(source: Path, directory: Path) -> None:
    from optimum.exporters.openvino import main_export  # type: ignore[import-not-found]
    from optimum.intel import OVConfig  # type: ignore[import-not-found]

    main_export(
        model_name_or_path=str(source),
        output=str(directory),
        task="text-generation-with-past",
        ov_config=OVConfig(dtype="fp32"),
        convert_tokenizer=any(source.glob("tokenizer*")),
        local_files_only=True,
    )


def main() -> None:
    for source, directory in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        convert(Path(source), Path(directory))


if __name__ == "__main__":
    main()
