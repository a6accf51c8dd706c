"""The text encoders of a base: one in Stable Diffusion 1.x and 2.x; two in XL and two or three in 3, as one network."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from segcn.models.family import SD3, Family, index_of


class TextEncoders(nn.Module):
    """The two text encoders of Stable Diffusion XL, and the second one's tokenizer."""

    def __init__(self, first: Any, second: CLIPTextModelWithProjection, tokenizer_2: CLIPTokenizer):
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.tokenizer_2 = first, second, tokenizer_2

    @property
    def device(self) -> torch.device:
        return self.text_encoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text_encoder.dtype

    @property
    def parts(self) -> dict[str, Any]:
        """Encoders and tokenizers, by the names of their folders, but the first tokenizer."""
        return {
            "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2, "tokenizer_2": self.tokenizer_2,
        }  # fmt: skip

    @property
    def of_clip(self) -> list[Any]:
        """Those that a LoRA may change."""
        return [self.text_encoder, self.text_encoder_2]

    def num_parameters(self) -> int:
        """Of all."""
        return sum(weight.numel() for weight in self.parameters())

    def tokenize(self, captions: list[str]) -> list[torch.Tensor]:
        """Token ids [B,L] of each encoder after the first."""
        return [tokenize(self.tokenizer_2, captions)]

    def forward(self, tokens: torch.Tensor, tokens_2: torch.Tensor) -> torch.Tensor:
        """Token ids [B,L] for each encoder -> [B,L+1,D].

        L lines are the hidden states before the last layers, side by side; the last line is the second encoder's pooled
        embedding, followed by zeros.
        """
        hidden, _, pooled = self._read(tokens, tokens_2)
        return torch.cat([hidden, _wide(pooled, hidden.shape[-1])[:, None]], dim=1)

    def _read(self, tokens: torch.Tensor, tokens_2: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Hidden states [B,L,D] side by side, the first encoder's output, and the second one's pooled embedding."""
        one = self.text_encoder(tokens, output_hidden_states=True)
        other = self.text_encoder_2(tokens_2, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], other.hidden_states[-2]], dim=-1), one, other.text_embeds


class ThreeTextEncoders(TextEncoders):
    """Those of Stable Diffusion 3: two of CLIP and T5, or zeros where a base has no T5."""

    def __init__(self, first: Any, second: Any, tokenizer_2: Any, third: T5EncoderModel | None, tokenizer_3: Any,
                 width: int):  # fmt: skip
        """width: D of their embeddings."""
        super().__init__(first, second, tokenizer_2)
        self.text_encoder_3, self.tokenizer_3, self.width = third, tokenizer_3, width

    @property
    def parts(self) -> dict[str, Any]:
        return super().parts | {"text_encoder_3": self.text_encoder_3, "tokenizer_3": self.tokenizer_3}

    def tokenize(self, captions: list[str]) -> list[torch.Tensor]:
        found = super().tokenize(captions)
        return found if self.tokenizer_3 is None else [*found, tokenize(self.tokenizer_3, captions, SD3.T5_LENGTH)]

    def forward(
        self, tokens: torch.Tensor, tokens_2: torch.Tensor, tokens_3: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Token ids [B,L] for each encoder -> [B,L+256+1,D].

        L lines are those of CLIP, followed by zeros, then those of T5; the last line holds both pooled embeddings.
        """
        hidden, one, pooled = self._read(tokens, tokens_2)
        if self.text_encoder_3 is None:
            third = hidden.new_zeros(len(hidden), SD3.T5_LENGTH, self.width)
        else:
            third = self.text_encoder_3(tokens_3)[0].to(hidden.dtype)
        both = torch.cat([one.text_embeds, pooled], dim=-1)
        return torch.cat([_wide(hidden, self.width), third, _wide(both, self.width)[:, None]], dim=1)


def _wide(embedding: torch.Tensor, width: int) -> torch.Tensor:
    """An embedding [...,D], followed by zeros."""
    return F.pad(embedding, (0, width - embedding.shape[-1]))


def load_text_encoder(
    folder: str | Path, family: Family, dtype: torch.dtype, exact: torch.dtype, network: Any, **hub: Any
) -> CLIPTextModel | TextEncoders:
    """The text encoder of a base, or its two or three, as one network.

    exact: the precision of CLIP's, where a LoRA is added to them first. network: the one that denoises.
    """
    plain = {key: value for key, value in hub.items() if key != "variant"}
    names = family.layout
    three = isinstance(family, SD3)
    kind = CLIPTextModelWithProjection if three else CLIPTextModel
    first = kind.from_pretrained(folder, subfolder="text_encoder", dtype=exact, **hub)
    if "text_encoder_2" not in names:
        return first
    second = CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2", dtype=exact, **hub)
    tokenizer_2 = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2", **plain)
    if not three:
        return TextEncoders(first, second, tokenizer_2)
    third = tokenizer_3 = None
    if _has(folder, "text_encoder_3", **plain):
        third = T5EncoderModel.from_pretrained(folder, subfolder="text_encoder_3", dtype=dtype, **hub)
        tokenizer_3 = T5TokenizerFast.from_pretrained(folder, subfolder="tokenizer_3", **plain)
    return ThreeTextEncoders(first, second, tokenizer_2, third, tokenizer_3, network.config.joint_attention_dim)


def _has(folder: str | Path, part: str, **hub: Any) -> bool:
    """Whether a base has a part that is optional."""
    if Path(folder).is_dir():
        return (Path(folder) / part).is_dir()
    return (index_of(folder, **hub).get(part) or [None])[0] is not None


def tokenize(tokenizer: Any, captions: list[str], length: int | None = None) -> torch.Tensor:
    """Captions -> token ids [B,L], padded and cut to a length L: by default the tokenizer's."""
    length = length or tokenizer.model_max_length
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
