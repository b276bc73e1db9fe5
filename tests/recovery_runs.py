"""What recover.py runs on in tests: a tiny random base with a character tokenizer, a text, and options for the CPU."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from pathlib import Path

import torch
from models import random_model
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

RECIPES = Path(__file__).parent.parent / "recipes"
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(RECIPES.parent),
}
SPECIAL = ["<pad>", "<unk>", "<eos>"]
VOCABULARY = [*SPECIAL, *string.printable]
LENGTH = 32
HEADS = 8
TEXT = Path(json.__file__).read_text() + Path(json.decoder.__file__).read_text()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    ids = {character: index for index, character in enumerate(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def save_base(folder: Path, model_type: str = "llama", **changes) -> Path:
    """A random model of a family with its tokenizer: 2 layers, 8 heads of 8 dimensions."""
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(model_type, **sizes | changes)
    random_model(config, attention="sdpa").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_text(path: Path, characters: int = 6000) -> Path:
    """Source code to calibrate and train on."""
    assert len(TEXT) >= characters
    path.write_text(TEXT[:characters])
    return path


def small(base: Path, dataset: Path, output: Path, **changes) -> list[str]:
    """Command line for a few steps on the CPU with the configuration of the bundled model."""
    options = {
        "config": RECIPES / "configs" / "tiny.yaml",
        "model_name_or_path": base,
        "dataset": dataset,
        "output_dir": output,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": LENGTH,
        "calibration_tokens": 1024,
        "lora_r": 8,
        "learning_rate": 0.01,
        "warmup_steps": 1,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    words = []
    for name, value in (options | changes).items():
        words += [f"--{name}", str(value)]
    return words


def run(script: str, *arguments: str) -> str:
    """A recipe in a process of its own; what it printed."""
    command = [sys.executable, str(RECIPES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(checkpoint: Path) -> list[float]:
    """Logged training losses up to a checkpoint."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors."""
    return load_file(folder / "adapter_model.safetensors")
