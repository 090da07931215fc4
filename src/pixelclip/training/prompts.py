"""What masks are assigned to: learnable class prompts, fixed words or free vectors."""

from collections.abc import Sequence
from importlib.resources import files
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pixelclip.backbones import Backbone, Text
from pixelclip.config import TrainConfig
from pixelclip.errors import ConfigError
from pixelclip.vocabulary import encode_classes, parse_classes, parse_templates

PLACEHOLDER = "x"  # one token in every tokenizer; its embedding is replaced
PROMPT_SEED = 0  # the same words in all runs, as in the authors' (behaviour.md 6f)
LAST_WORDS = 10  # of the vocabulary, which are never drawn


class ClassPrompts(nn.Module):
    """Learnable tokens in a template, encoded by the frozen text tower (behaviour.md 6e).

    Attributes:
        tokens: learnable embeddings, [K, L, E].
    """

    template_tokens: Tensor

    def __init__(
        self,
        text: Text,
        tokens: Float[Tensor, "K L E"],
        templates: Sequence[str],
        *,
        authors_defects: bool = False,
    ):
        super().__init__()
        self.tokens = nn.Parameter(tokens.clone())
        self.authors_defects = authors_defects
        length = tokens.shape[1]
        placeholders = " ".join([PLACEHOLDER] * length)
        ids = text.tokenize([template.replace("{}", placeholders) for template in templates])
        apart = ids.clone(memory_format=torch.contiguous_format)  # several processes share buffers
        self.register_buffer("template_tokens", apart, persistent=False)
        wanted = int(text.tokenize([PLACEHOLDER])[0, 1])
        self.starts = [
            _start(row, wanted, length, t) for row, t in zip(ids, templates, strict=True)
        ]

    def forward(self, text: Text) -> Float[Tensor, "K D"]:
        """Text features of all prompts, not normalised: the mean over the templates.

        The authors embed the first template only, whatever the template, so that with several the
        learnable tokens replace the wrong words (behaviour.md 6h); `authors_defects` does so too.
        """
        features = []
        for index, start in enumerate(self.starts):
            ids = self.template_tokens[index]
            ids = ids[: int(ids.count_nonzero())]  # tokens behind the end cannot matter
            source = self.template_tokens[0, : len(ids)] if self.authors_defects else ids
            features.append(self._encode(text, ids, text.embed(source[None])[0], start))
        return torch.stack(features).mean(dim=0)

    def _encode(
        self, text: Text, ids: Int[Tensor, " L"], words: Float[Tensor, "L E"], start: int
    ) -> Float[Tensor, "K D"]:
        num, length = self.tokens.shape[:2]
        before, after = (
            part.expand(num, -1, -1) for part in (words[:start], words[start + length :])
        )
        embeddings = torch.cat([before, self.tokens.to(words.dtype), after], dim=1)
        return text(ids.expand(num, -1), embeddings)


def _start(ids: Int[Tensor, " L"], placeholder: int, length: int, template: str) -> int:
    """Where the placeholders stand in a tokenised template.

    Raises:
        ConfigError: they cannot be found, or do not fit into the text tower's context.
    """
    places = (ids == placeholder).nonzero()[:, 0].tolist()
    if template.count("{}") != 1 or len(places) != length:
        raise ConfigError(
            f"train_templates: {template!r} cannot hold prompts of {length} tokens; it needs one"
            f" {{}}, no single {PLACEHOLDER!r}, and fewer words"
        )
    return int(places[0])


class WordVectors(nn.Module):
    """Fixed words instead of learnable prompts (an ablation of the paper)."""

    features: Tensor

    def __init__(self, features: Float[Tensor, "K D"]):
        super().__init__()
        self.register_buffer("features", features.clone(), persistent=False)

    def forward(self, text: Text) -> Float[Tensor, "K D"]:
        """The words' text features."""
        return self.features


class FreeVectors(nn.Module):
    """Learnable vectors without a text tower (an ablation of the paper)."""

    def __init__(self, num_clusters: int, dim: int, generator: torch.Generator):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(num_clusters, dim, generator=generator))

    def forward(self, text: Text) -> Float[Tensor, "K D"]:
        """The vectors."""
        return self.vectors


def make_vectors(
    backbone: Backbone, config: TrainConfig, generator: torch.Generator
) -> ClassPrompts | WordVectors | FreeVectors:
    """What the configuration asks for.

    Raises:
        ConfigError: too few words, or a template that does not fit.
    """
    text, num = cast(Text, backbone.text), config.num_clusters
    templates = parse_templates(config.train_templates)
    if config.class_vectors == "free":
        return FreeVectors(num, backbone.dim, generator)
    if config.class_vectors == "words":
        return WordVectors(encode_classes(text, chosen_words(config), templates))
    if config.prompt_start == "words":
        start = word_tokens(text, chosen_words(config), config.prompt_length)
    else:
        drawn = torch.Generator().manual_seed(PROMPT_SEED)
        start = _embedded(text, draw_words(text, num, config.prompt_length, drawn))
    return ClassPrompts(text, start, templates, authors_defects=config.authors_defects)


def chosen_words(config: TrainConfig) -> tuple[str, ...]:
    """As many words as there are clusters.

    Raises:
        ConfigError: there are fewer.
    """
    words = common_words() if config.words == "common" else parse_classes(config.words)
    if len(words) < config.num_clusters:
        raise ConfigError(
            f"words: {config.words} holds {len(words)} names, but num_clusters is"
            f" {config.num_clusters}"
        )
    return words[: config.num_clusters]


def common_words() -> tuple[str, ...]:
    """Names of everyday things, our own list, roughly by how much of photos they cover."""
    text = files("pixelclip").joinpath("data/common_words.txt").read_text("utf-8")
    return tuple(text.splitlines())


def draw_words(text: Text, num: int, length: int, generator: torch.Generator) -> Int[Tensor, "K L"]:
    """Token ids of random words."""
    return torch.randint(text.vocabulary_size - LAST_WORDS, (num, length), generator=generator)


def word_tokens(text: Text, words: Sequence[str], length: int) -> Float[Tensor, "K L E"]:
    """Embeddings of given words: their tokens, repeated to fill the prompt."""
    rows = []
    for ids in (text.tokenize([word])[0] for word in words):
        inner = ids[1 : int(ids.count_nonzero()) - 1]  # between start and end
        rows.append(inner[torch.arange(length) % len(inner)])
    return _embedded(text, torch.stack(rows))


@torch.no_grad()
def _embedded(text: Text, ids: Int[Tensor, "K L"]) -> Float[Tensor, "K L E"]:
    return text.embed(ids.to(text.tokenize([PLACEHOLDER]).device))
