"""Tokenizers and text encoders that diffusers' tests would download: tiny ones in their place."""

from __future__ import annotations

import contextlib
import zlib
from typing import Any, ClassVar

import torch
import transformers

#: Tokens of a text, at most, where nobody says how many.
_LENGTH = 16
_WORDS = 99


class Tokenizer:
    """Any tokenizer: a number for every three letters."""

    model_max_length = 77
    pad_token, eos_token, bos_token, unk_token = "<pad>", "<eos>", "<bos>", "<unk>"
    pad_token_id, eos_token_id, bos_token_id, unk_token_id = 0, 2, 1, 3
    padding_side = "right"
    vocab_size = _WORDS
    image_token_id = video_token_id = 5
    special_tokens_map: ClassVar[dict[str, str]] = {}
    added_tokens_encoder: ClassVar[dict[str, int]] = {}
    added_tokens_decoder: ClassVar[dict[int, str]] = {}

    def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else list(text)
        # Templates are cut off by a number of tokens, so there have to be enough.
        pieces = [[t[i : i + 3] for i in range(0, len(t), 3)] for t in texts]
        ids = [[4 + zlib.crc32(p.encode()) % (_WORDS - 5) for p in of] + [2] for of in pieces]
        padding = options.get("padding")
        longest = max(len(i) for i in ids)
        if padding == "max_length":
            longest = options.get("max_length") or self.model_max_length
        elif options.get("truncation") and options.get("max_length"):
            longest = min(longest, options["max_length"])
        rows = [(i + [0] * longest)[:longest] for i in ids]
        mask = [[int(k < len(i)) for k in range(longest)] for i in ids]
        found: dict[str, Any] = {"input_ids": rows, "attention_mask": mask}
        if options.get("return_tensors") == "pt":
            found = {k: torch.tensor(v) for k, v in found.items()}
        if options.get("return_length"):
            found["length"] = [longest] * len(rows)
        return transformers.BatchEncoding(found)

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        return ["" for _ in ids]

    def decode(self, ids: Any, **options: Any) -> str:
        return ""

    def tokenize(self, text: str, **options: Any) -> list[str]:
        return text.split()

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        return 4 if isinstance(tokens, str) else [4 for _ in tokens]

    def encode(self, text: str, *args: Any, **options: Any) -> list[int]:
        return list(self(text)["input_ids"][0])

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        said = " ".join(str(m) for m in messages)
        return self(said, **options) if options.get("tokenize", True) else said

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        pass

    def add_tokens(self, *args: Any, **options: Any) -> int:
        return 0

    def __len__(self) -> int:
        return _WORDS


def _t5_config(*args: Any, **options: Any) -> Any:
    return transformers.T5Config(
        vocab_size=_WORDS, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )


def _t5(*args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.T5EncoderModel(_t5_config()).eval()


def _gemma(*args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=_WORDS, hidden_size=32, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return transformers.Gemma2Model(config).eval()


def install() -> None:
    """Put them in the place of what would be downloaded."""
    names = [n for n in dir(transformers) if "Tokenizer" in n and not n.startswith("_")]
    for name in names:
        made = getattr(transformers, name)
        if isinstance(made, type):
            with contextlib.suppress(ImportError):  # of one that needs sentencepiece
                made.from_pretrained = staticmethod(lambda *a, **k: Tokenizer())
    # Pipelines check what they are given by class.
    transformers.T5EncoderModel.from_pretrained = staticmethod(_t5)
    transformers.AutoConfig.from_pretrained = staticmethod(_t5_config)
    transformers.Gemma2Model.from_pretrained = staticmethod(_gemma)
