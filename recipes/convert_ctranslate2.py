"""CTranslate2's own converter, told what it does not know of a merged checkpoint: wide heads, no unknown token.

    python -m recipes.convert_ctranslate2 CHECKPOINT OUTPUT --quantization int8

Heads wider than the base's turn at frequencies that the checkpoint states as RoPE of type longrope. Of a Mistral model
the converter reads the type but not the factors, and stops ("Some required model attributes are not set"). A tokenizer
without unknown token it writes in a way that CTranslate2 then does not load.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from asymgqa_peft.mistakes import model_called
from recipes.convert_gguf import longrope, single_factors


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of the merged model")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write")
    parser.add_argument("--quantization", help="of the weights, as for ct2-transformers-converter")
    args = parser.parse_args(arguments)
    if not (args.checkpoint / "config.json").is_file():
        raise SystemExit(f"{model_called(str(args.checkpoint))}: it holds no config.json.")
    convert(args.checkpoint, args.output, args.quantization)


def convert(checkpoint: Path, output: Path, quantization: str | None = None):
    """Write the converted model, and return CTranslate2's specification of it.

    Raises:
        SystemExit: if the checkpoint's RoPE is of type longrope and CTranslate2 cannot hold its factors.
    """
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def _load(self):
            self.spec = super()._load()
            complete(self.spec, json.loads((checkpoint / "config.json").read_text()))
            return self.spec

    converter = Converter(str(checkpoint))
    converter.convert(str(output), quantization=quantization)
    return converter.spec


def complete(spec, config: dict) -> None:
    """Set what the converter leaves out of a decoder's specification, before anything is written."""
    spec.config.unk_token = spec.config.unk_token or ""
    if longrope(config) is None:
        return
    factors = np.float32(single_factors(config))
    for layer in spec.decoder.layer:
        # Some loaders do not look at the type of RoPE, and CTranslate2 would compute with plain RoPE.
        if not hasattr(layer.self_attention, "rotary_scaling_short_factor"):
            raise SystemExit(
                f"CTranslate2's loader of {config['architectures'][0]} does not know RoPE of type longrope, which "
                "wide heads need: serve it with transformers."
            )
        layer.self_attention.rotary_scaling_short_factor = factors
        layer.self_attention.rotary_scaling_long_factor = factors


if __name__ == "__main__":
    main()
