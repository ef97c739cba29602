"""The demo model's language: a closed vocabulary of words and a small transformer over them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from asyncdiff.errors import InputError

PAD, BEGIN, FIRST_WORD = 0, 1, 2
"""Token 0 pads, token 1 begins every prompt; an empty prompt (guidance) is token 1 alone."""


class Vocabulary:
    """Turns prompts into rows of token numbers; plays the tokenizer's part in the pipeline."""

    def __init__(self, words: Sequence[str], length: int = 16) -> None:
        self.words = list(words)
        self.length = length
        self._number = {word: FIRST_WORD + i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return FIRST_WORD + len(self.words)

    @staticmethod
    def split(prompt: str) -> list[str]:
        return re.findall(r"[a-z0-9]+", prompt.lower().replace("'", ""))

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that the model has never seen."""
        return [word for word in self.split(prompt) if word not in self._number]

    def __call__(self, prompts: str | Iterable[str]) -> Tensor:
        """Token numbers ``[prompts, length]``; raises InputError for what it cannot read."""
        rows = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            if not isinstance(prompt, str):
                raise InputError(f"a prompt is a string, not {type(prompt).__name__}")
            if missing := self.unknown(prompt):
                hints = []
                for word in missing:
                    close = difflib.get_close_matches(word, self.words, n=3, cutoff=0.6)
                    hints.append(f"'{word}'" + (f" (near: {', '.join(close)})" if close else ""))
                raise InputError(
                    f"the emoji model does not know {', '.join(hints)} in the prompt "
                    f"'{prompt}'. It knows {len(self.words)} words; "
                    "asyncdiff.demo.known_prompts() lists prompts that it draws well."
                )
            numbers = [self._number[word] for word in self.split(prompt)]
            if len(numbers) > self.length - 1:
                raise InputError(
                    f"a prompt has at most {self.length - 1} words, this one has {len(numbers)}: "
                    f"'{prompt}'"
                )
            rows.append([BEGIN, *numbers, *[PAD] * (self.length - 1 - len(numbers))])
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), self.length)


class WordEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Word and position embeddings, a few transformer layers, a norm.

    ``[batch, length]`` -> ``[batch, length, width]``. A model of diffusers, so that pipelines can
    be saved and loaded; its configuration has the ``words``, which are a vocabulary's.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        words: Sequence[str],
        length: int = 16,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(FIRST_WORD + len(words), width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                heads,
                4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.word.weight, std=0.5)

    @property
    def vocabulary(self) -> Vocabulary:
        """What turns prompts into this encoder's tokens."""
        return Vocabulary(self.config.words, self.config.length)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word(tokens) + self.position
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out
