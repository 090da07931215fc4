"""CLIP's text tower: tokens, or embeddings in their place, to text features."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import LayerNorm, LayerNormFp32
from torch import Tensor, nn

from pixelclip.backbones.blocks import run_block


class ClipText(nn.Module):
    """Text features of a CLIP, computed only up to the last end token of the batch.

    The transformer is causal and only the end token's output is read, so cutting the batch at
    its longest text is exact (speed.md ii). Parameter names are those of `open_clip.CLIP`.
    """

    attn_mask: Tensor

    def __init__(self, clip: CLIP):
        super().__init__()
        self.dim = int(clip.text_projection.shape[1])
        self.context_length = int(clip.context_length)
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.transformer = clip.transformer
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        self.logit_scale = clip.logit_scale
        self.register_buffer("attn_mask", clip.attn_mask, persistent=False)
        self.tokenizer = SimpleTokenizer(context_length=self.context_length)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return len(self.token_embedding.weight)

    @property
    def temperature(self) -> float:
        """Factor on cosines before a softmax over classes."""
        return float(self.logit_scale.exp().max())

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "N L"]:
        """Token ids, zero-padded behind the end token, L = length of the longest text.

        A text longer than the context keeps its beginning and gets an end token.
        """
        tokens = self.tokenizer(list(texts))
        longest = int(tokens.argmax(dim=1).max()) + 1
        return tokens[:, :longest].to(self.positional_embedding.device)

    def embed(self, tokens: Int[Tensor, "N L"]) -> Float[Tensor, "N L E"]:
        """Token embeddings, without positions."""
        return self.token_embedding(tokens)

    def forward(
        self, tokens: Int[Tensor, "N L"], embeddings: Float[Tensor, "N L E"] | None = None
    ) -> Float[Tensor, "N D"]:
        """Text features, not normalised.

        Args:
            tokens: ids; the highest of each row is the end token, whose output is read.
            embeddings: used instead of the token table, as learnable prompts need
                (behaviour.md 6e); `tokens` still say where each text ends.
        """
        length = tokens.shape[1]
        hidden = self.embed(tokens) if embeddings is None else embeddings
        dtype = self.transformer.get_cast_dtype()
        hidden = hidden.to(dtype) + self.positional_embedding[:length].to(dtype)
        mask = self.attn_mask[:length, :length].to(dtype)
        for block in self.transformer.resblocks:
            hidden = run_block(block, hidden, mask)
        ends = tokens.argmax(dim=1)
        hidden = hidden[torch.arange(len(tokens), device=tokens.device), ends]  # [N, E]
        return self.ln_final(hidden) @ self.text_projection


def half_precision(text: ClipText) -> ClipText:
    """A copy that computes in float16 with LayerNorm in float32 (behaviour.md 6c).

    The authors make their class embeddings this way for OpenAI's weights.
    """
    text = copy.deepcopy(text).half()
    for module in text.modules():
        for name, child in module.named_children():
            if isinstance(child, LayerNorm):
                replacement = LayerNormFp32(child.normalized_shape, eps=child.eps)
                replacement.load_state_dict(child.float().state_dict())
                setattr(module, name, replacement)
    return text
