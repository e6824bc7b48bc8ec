"""Sample the bundled calibration and evaluation texts from the bundled reference checkpoint, and
describe them in manifest.json.

    python calibration/sample.py            # needs the package installed; a few minutes on one core

Documents of 512 tokens (a start token and 511 sampled at temperature 1) are decoded, those that are
not whole UTF-8 text are dropped, and the others are written to one text file, a newline after each.
Calibration and evaluation have seeds of their own. Another processor or library version rounds
differently and samples another text, hence the manifest's checksums.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.calibrate.sampling import sample
from compressor.files.bundled import bundled_folder

LENGTH = 512
SPLITS = {"calibration": (11, 144), "evaluation": (12, 72)}  # name: (seed, documents)


def sample_text(model, tokenizer, seed: int, documents: int) -> str:
    """Sample documents and join those that decode to whole UTF-8 text and hold no special token."""
    special = torch.tensor(tokenizer.all_special_ids)
    rows = sample(model, documents, LENGTH, seed)[:, 1:]
    texts = [tokenizer.decode(row) for row in rows if not torch.isin(row, special).any()]
    return "".join(text + "\n" for text in texts if "\ufffd" not in text and "\r" not in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        type=Path,
        default=bundled_folder("reference"),
        help="checkpoint folder to sample from",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=bundled_folder("calibration"),
        help="folder for the texts and manifest.json",
    )
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, local_files_only=True
    ).eval()
    files = {}
    for name, (seed, documents) in SPLITS.items():
        text = sample_text(model, tokenizer, seed, documents)
        data = text.encode()
        (options.output / f"{name}.txt").write_bytes(data)
        tokens = len(tokenizer(text, verbose=False)["input_ids"])
        files[f"{name}.txt"] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "tokens": tokens,
            "seed": seed,
        }
    manifest = {
        "source": "sampled from the bundled reference checkpoint at temperature 1",
        "checkpoint_sha256": hashlib.sha256(
            (options.model / "model.safetensors").read_bytes()
        ).hexdigest(),
        "licence": "the project's own",
        "command": "python calibration/sample.py",
        "files": files,
    }
    (options.output / "manifest.json").write_text(
        json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    )


if __name__ == "__main__":
    main()
