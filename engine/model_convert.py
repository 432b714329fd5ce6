"""A GGUF file becomes a Hugging Face checkpoint in float32: `python -m engine.model_convert GGUF FOLDER`.

A process of its own, so that torch and transformers are loaded by nobody else. Its lines that start with STAGE
say what it is doing.
"""

from __future__ import annotations

import sys
from pathlib import Path

STAGE = "stage: "


def convert(gguf: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors, the tokenizer and its chat template."""
    _say("importing torch and transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _say("reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    _say("dequantizing the weights")
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    _say("writing the checkpoint")
    # What a GGUF file does not say of its tokenizer, and a server needs: a length that is a number, the token that
    # ends an answer (the tokenizer would take the one that begins a turn), and text as it was generated.
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _say(stage: str) -> None:
    print(f"{STAGE}{stage}", flush=True)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
