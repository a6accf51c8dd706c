"""The text encoders of a base: one in Stable Diffusion 1.x and 2.x; two in XL, here as one network."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class TextEncoders(nn.Module):
    """The two text encoders of Stable Diffusion XL, and the second one's tokenizer."""

    def __init__(self, first: CLIPTextModel, second: CLIPTextModelWithProjection, tokenizer_2: CLIPTokenizer):
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.tokenizer_2 = first, second, tokenizer_2

    @property
    def device(self) -> torch.device:
        return self.text_encoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text_encoder.dtype

    def num_parameters(self) -> int:
        """Of both."""
        return self.text_encoder.num_parameters() + self.text_encoder_2.num_parameters()

    def forward(self, tokens: torch.Tensor, tokens_2: torch.Tensor) -> torch.Tensor:
        """Token ids [B,L] for each encoder -> [B,L+1,D].

        L lines are the hidden states before the last layers, side by side; the last line is the second encoder's pooled
        embedding, followed by zeros.
        """
        one = self.text_encoder(tokens, output_hidden_states=True)
        other = self.text_encoder_2(tokens_2, output_hidden_states=True)
        hidden, pooled = torch.cat([one.hidden_states[-2], other.hidden_states[-2]], dim=-1), other.text_embeds
        line = F.pad(pooled, (0, hidden.shape[-1] - pooled.shape[-1]))
        return torch.cat([hidden, line[:, None]], dim=1)


def load_text_encoder(folder: str | Path, two: bool, dtype: torch.dtype, **hub: Any) -> CLIPTextModel | TextEncoders:
    """The text encoder of a base, or its two."""
    first = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype, **hub)
    if not two:
        return first
    second = CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2", dtype=dtype, **hub)
    hub.pop("variant", None)
    return TextEncoders(first, second, CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2", **hub))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Captions -> token ids [B,L], padded and cut to the tokenizer's length L."""
    length = tokenizer.model_max_length
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
