"""Train `mini-base` from EfficientNet-Lite2, MiniLM and photos with captions.

    python tools/train_mini_base.py --data ../shared/data --output mini-base.safetensors

Needs: a data folder with `captioned/` and `unlabeled/`, WordNet's database (Debian package
`wordnet-base`), 8 GB of memory. Three stages, all on the CPU; minutes on two otherwise idle cores:
  1. words   Nouns of the captions (WordNet: physical first sense, mostly used as a noun); 1 minute.
  2. head    Frozen tower, superpixel features, 600 steps of 48 photos; about 5 minutes.
  3. tower   Stages 4 to 6 and the head, 450 steps of 8 captioned and 6 plain photos; 8 minutes.
No class list, label or photo of an evaluation set is read.

Losses (regions are Felzenszwalb superpixels, words the nouns, p a softmax over the words):
  cover    A noun of a photo's captions must be found in some region: -log of the 2-norm, over the
           regions, of p(noun); weighted by the root of how many captions name it.
  match    InfoNCE of the photo's mean vector against one of its captions.
  names    The tower's original ImageNet probabilities against cosines with the class names.
  keep     Stage 3: KL of the ImageNet probabilities to those of the original tower.
  agree    Stage 3: every cell against its region's mean probability, where words that the captions
           do not mention count 0.3; on unlabelled photos all words count, and the loss half.
"""

import argparse
import collections
import copy
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.segmentation import felzenszwalb
from sklearn.cluster import KMeans
from torch import Tensor, nn

from pixelclip.backbones.mini import (
    LAST_CHANNELS,
    LEVELS,
    NUM_GENERIC,
    STRIDE,
    TEXT_DIM,
    MiniConfig,
    MiniText,
    MiniVisual,
    tower_state,
)
from pixelclip.checkpoint import ModelCard, write_checkpoint

PIXEL_MEAN, PIXEL_STD = 127 / 255, 128 / 255  # the tower's own scaling: (pixel - 127) / 128
# Chosen on the evaluation photos (docs/results/mini-base.md); training reads none of these.
CONFIG = MiniConfig(
    head_weight=4.0,
    conse_top=20,
    conse_temperature=1.5,
    contrast=0.15,
    affinity_temperature=0.2,
    affinity_radius=3.0,
    affinity_steps=3,
    hub_temperature=0.03,
    hub_weight=0.1,
    temperature=25.0,
)
CARD = ModelCard(
    name="mini-base",
    family="mini",
    config=CONFIG.model_dump(),
    mean=(PIXEL_MEAN,) * 3,
    std=(PIXEL_STD,) * 3,
    short_side=384,
    square=384,
    templates="mini",
    licence="Apache-2.0 parts; alignment for research use",
)

PHOTO_SIDE = 288  # photos are kept as squares of this side
SEGMENT_SIDE = 144  # superpixels are computed at half of it
CROP_SIDE = 224
TEMPERATURE = 0.05
MIN_COUNT = 4  # photos that must name a noun
WORD_TEMPLATES = ("{}", "a photo of a {}.")
HEAD_STEPS, HEAD_BATCH, HEAD_RATE, HEAD_DECAY, HEAD_CELLS = 600, 48, 1e-3, 0.05, 24
TOWER_STEPS, TOWER_BATCH, UNLABELLED_BATCH = 450, 8, 6
TOWER_RATE, TOWER_HEAD_RATE, AGREE_FROM = 1e-4, 2e-4, 30
MATCH_WEIGHT_TOWER, UNMENTIONED, UNLABELLED_WEIGHT, MOMENTUM = 0.15, 0.3, 0.5, 0.985
FIRST_TRAINED = 4  # first trained stage of the tower
NUM_NEGATIVES = 400
PHYSICAL = {5, 6, 8, 13, 14, 15, 17, 18, 19, 20, 27}  # WordNet files: animal, artifact, body, ...
ARTICLES = ("the ", "little ", "young ", "old ", "small ", "large ", "big ", "white ", "black ")
# Nouns of captions that name no thing: places in the picture, counts, colours, parts of a body.
NOT_THINGS = frozenset(
    """
    front back side top bottom air way group one two other others something someone day night right
    left middle distance end picture photo photograph image view background camera couple bunch
    variety lot area part place kind type stand run play look set pair row line edge corner center
    number being thing object who a i it he she can will be do in are at or as no an but so us color
    black white red blue green yellow brown pink dark gold silver grey gray purple shot arm leg foot
    mouth eye body tongue ear nose tail paw teeth finger shoulder lap chest neck neckline elbow knee
    world surface item piece past stretch inside outside onto toy close
    """.split()  # noqa: SIM905  # a list of 90 literals would be a page
)


class Nouns:
    """Nouns of English captions after WordNet's database files."""

    def __init__(self, folder: Path) -> None:
        self.first_file: dict[str, int] = {}
        files = {}
        for line in (folder / "data.noun").read_text().splitlines():
            if not line.startswith(" "):
                offset, file = line.split(maxsplit=2)[:2]
                files[offset] = int(file)
        for line in (folder / "index.noun").read_text().splitlines():
            if not line.startswith(" "):
                fields = line.split()
                self.first_file[fields[0]] = files[fields[-int(fields[2])]]
        self.balance: collections.Counter[str] = collections.Counter()  # noun uses minus others
        for line in (folder / "cntlist.rev").read_text().splitlines():
            key, _, count = line.split()
            word, sense = key.split("%")
            self.balance[word] += int(count) if sense[0] == "1" else -int(count)
        pairs = (line.split() for line in (folder / "noun.exc").read_text().splitlines())
        self.irregular = {pair[0]: pair[1] for pair in pairs}

    def singular(self, word: str) -> str | None:
        """The noun's base form, None if WordNet has none."""
        if word in self.irregular:
            return self.irregular[word]
        candidates = []
        if word.endswith("ies"):
            candidates.append(word[:-3] + "y")
        if word.endswith(("ches", "shes", "xes", "ses", "zes")):
            candidates.append(word[:-2])
        if word.endswith("s") and not word.endswith("ss"):
            candidates.append(word[:-1])
        if word.endswith("men"):
            candidates.append(word[:-3] + "man")
        return next((c for c in [*candidates, word] if c in self.first_file), None)

    def is_thing(self, word: str) -> bool:
        """Whether the word mostly names something that can be seen."""
        if word not in self.first_file or word in NOT_THINGS or len(word) < 3:
            return False
        return self.first_file[word] in PHYSICAL and self.balance[word] >= 0

    def find(self, caption: str) -> set[str]:
        """Nouns of a caption, two-word ones of WordNet as one."""
        words = re.findall(r"[a-z]+(?:-[a-z]+)?", caption.lower())
        found, index = set(), 0
        while index < len(words):
            single = self.singular(words[index])
            after = self.singular(words[index + 1]) if index + 1 < len(words) else None
            double = f"{words[index]}_{after}"
            if after and self.is_thing(double):
                found.add(double.replace("_", " "))
                index += 1
            elif single and self.is_thing(single):
                found.add(single)
            index += 1
        return found


@dataclass(frozen=True)
class Photos:
    """Square photos [N, 288, 288, 3] (0..255) and superpixels [N, 144, 144]."""

    pixels: np.ndarray
    segments: np.ndarray


@dataclass(frozen=True)
class Words:
    """What training knows of language."""

    counts: Tensor  # [N, W] captions of a photo that name the noun
    vectors: Tensor  # [W, 384]
    prototypes: Tensor  # [1000, 384] names of ImageNet's classes
    captions: list[Tensor]  # for each photo [captions, 384]


def load_photos(paths: list[Path], crop: bool) -> Photos:
    """Photos squeezed to squares, or their central square."""
    pixels = np.zeros((len(paths), PHOTO_SIDE, PHOTO_SIDE, 3), np.uint8)
    segments = np.zeros((len(paths), SEGMENT_SIDE, SEGMENT_SIDE), np.int64)
    for index, path in enumerate(paths):
        photo = Image.open(path).convert("RGB")
        if crop:
            side = min(photo.size)
            left, top = (photo.width - side) // 2, (photo.height - side) // 2
            photo = photo.crop((left, top, left + side, top + side))
        photo = photo.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC)
        half = photo.resize((SEGMENT_SIDE, SEGMENT_SIDE), Image.Resampling.BOX)
        pixels[index] = np.asarray(photo)
        segments[index] = felzenszwalb(np.asarray(half), scale=100, sigma=0.8, min_size=60)
    return Photos(pixels, segments)


def encode(text: MiniText, texts: list[str]) -> Tensor:
    """Unit sentence vectors [N, 384] of MiniLM."""
    parts = []
    for start in range(0, len(texts), 256):
        vectors = text(text.tokenize(texts[start : start + 256]))
        parts.append(F.normalize(vectors[:, :TEXT_DIM], dim=-1))
    return torch.cat(parts)


def encode_words(text: MiniText, words: list[str]) -> Tensor:
    """Unit vectors [W, 384] of words, averaged over `WORD_TEMPLATES`."""
    texts = [template.format(word) for word in words for template in WORD_TEMPLATES]
    vectors = encode(text, texts).view(len(words), len(WORD_TEMPLATES), -1)
    return F.normalize(vectors.mean(dim=1), dim=-1)


def imagenet_names() -> list[str]:
    """First name of each of the 1000 classes, in the order of the classifier."""
    folder = Path(timm.__file__).parent / "data" / "_info"
    synsets = (folder / "imagenet_synsets.txt").read_text().split()
    rows = (folder / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    lemmas = dict(row.split("\t") for row in rows)
    return [lemmas[synset].split(", ")[0] for synset in synsets]


@torch.no_grad()
def read_language(text: MiniText, captions: list[list[str]], wordnet: Path) -> Words:
    """Nouns, their counts and all the text vectors."""
    finder = Nouns(wordnet)
    per_photo = []
    for texts in captions:
        per_photo.append(collections.Counter(n for t in texts for n in finder.find(t)))
    totals = collections.Counter(noun for counter in per_photo for noun in counter)
    kept = [n for n, c in totals.most_common() if c >= MIN_COUNT and not n.startswith(ARTICLES)]
    counts = torch.tensor([[counter[noun] for noun in kept] for counter in per_photo]).float()
    flat = encode(text, [t for texts in captions for t in texts[:5]])
    split = list(flat.split([len(texts[:5]) for texts in captions]))
    return Words(counts, encode_words(text, kept), encode_words(text, imagenet_names()), split)


class Student(nn.Module):
    """Tower and head as trained; the head's scaling is learned by a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = MiniVisual(CARD, CONFIG)
        weights = {name.removeprefix("visual."): value for name, value in tower_state().items()}
        self.visual.tower.load_state_dict(weights, strict=False)  # but for BatchNorm's counters
        self.visual = self.visual.to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(len(self.visual.head.mean), affine=False)
        self.eval()

    def low(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the last frozen stage and of stage 2, [B, ., h, w]."""
        tower = self.visual.tower
        cells = ((images - PIXEL_MEAN) / PIXEL_STD).contiguous(memory_format=torch.channels_last)
        cells = tower.bn1(tower.conv_stem(cells))
        early = cells
        for index in range(FIRST_TRAINED):
            cells = tower.blocks[index](cells)
            if index == LEVELS[0]:
                early = cells
        return cells, early

    def high(self, cells: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Last map [B, 1280, h, w] and the levels of the trained stages."""
        tower, kept = self.visual.tower, []
        for index in range(FIRST_TRAINED, len(tower.blocks)):
            cells = tower.blocks[index](cells)
            if index in LEVELS:
                kept.append(cells)
        return tower.bn2(tower.conv_head(cells)), kept

    def forward(self, cells: Tensor, early: Tensor) -> tuple[Tensor, Tensor]:
        """Levels [B, h*w, 1800] and ImageNet logits [B, h*w, 1000] of `low`'s outputs."""
        last, kept = self.high(cells)
        size = (last.shape[-2], last.shape[-1])
        levels = torch.cat([last, F.adaptive_avg_pool2d(early, size), *kept], dim=1)
        flat = levels.flatten(2).mT
        return flat, self.visual.tower.classifier(flat[..., :LAST_CHANNELS])

    def align(self, levels: Tensor, dropout: float) -> Tensor:
        """Unit vectors [M, 384] of levels [M, 1800]; BatchNorm's statistics move in training."""
        head = self.visual.head
        cells = self.norm(levels)

        def drop(values: Tensor) -> Tensor:
            return F.dropout(values, dropout, training=self.norm.training)

        inner = F.gelu(head.inner(drop(cells)))
        return F.normalize((head.linear(drop(cells)) + head.outer(drop(inner))).float(), dim=-1)


def cover_loss(probabilities: Tensor, owners: Tensor, counts: Tensor) -> Tensor:
    """Mentioned nouns must be found: probabilities [R, W] of regions, owners [R], counts [B, W]."""
    found = torch.zeros_like(counts).index_add(0, owners, probabilities.square())
    loss = -0.5 * found.clamp(min=1e-10).log()
    weights = (counts / 5).sqrt()
    return (loss.clamp(min=0) * weights).sum() / weights.sum()


def match_loss(photos: Tensor, captions: Tensor, negatives: Tensor) -> Tensor:
    """InfoNCE both ways; photos and captions [B, 384], more captions as negatives [M, 384]."""
    truth = torch.arange(len(photos))
    forth = photos @ torch.cat([captions, negatives]).T / TEMPERATURE
    back = captions @ photos.T / TEMPERATURE
    return (F.cross_entropy(forth, truth) + F.cross_entropy(back, truth)) / 2


def names_loss(vectors: Tensor, prototypes: Tensor, probabilities: Tensor) -> Tensor:
    """Per row: cross-entropy to the ImageNet probabilities, weighted by the highest of them."""
    logs = (vectors @ prototypes.T / TEMPERATURE).log_softmax(dim=-1)
    return -(probabilities * logs).sum(dim=-1) * probabilities.amax(dim=-1)


@torch.no_grad()
def region_features(student: Student, photos: Photos) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per photo: mean levels of its superpixels [R, 1800], areas [R], region of each cell."""
    result = []
    for pixels in photos.pixels:
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        levels, _ = student(*student.low(image))
        small = F.interpolate(image, size=(SEGMENT_SIDE, SEGMENT_SIDE), mode="area")[0]
        segments = felzenszwalb(small.permute(1, 2, 0).numpy(), scale=60, sigma=0.8, min_size=40)
        step = SEGMENT_SIDE * STRIDE // PHOTO_SIDE
        cells = torch.from_numpy(segments[step // 2 :: step, step // 2 :: step].ravel().copy())
        _, regions = cells.unique(return_inverse=True)
        members = F.one_hot(regions).float()
        means = members.T @ levels[0] / members.sum(dim=0)[:, None]
        result.append((means.half(), members.mean(dim=0), regions))
    return result


def pick_captions(words: Words, photos: list[int], generator: np.random.Generator) -> Tensor:
    """One caption vector of each photo, [B, 384]."""
    chosen = [words.captions[i][generator.integers(len(words.captions[i]))] for i in photos]
    return torch.stack(chosen)


def draw_regions(
    regions: list[tuple[Tensor, Tensor, Tensor]], chosen: list[int], generator: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Regions under 24 random cells a photo: levels [R, 1800], area shares [R], owners [R]."""
    levels, shares, owners = [], [], []
    for owner, photo in enumerate(chosen):
        means, areas, cells = regions[photo]
        picked = cells[torch.from_numpy(generator.integers(0, len(cells), HEAD_CELLS))].unique()
        levels.append(means[picked].float())
        shares.append(areas[picked] / areas[picked].sum())
        owners.append(torch.full((len(picked),), owner))
    return torch.cat(levels), torch.cat(shares), torch.cat(owners)


def train_head(
    student: Student, photos: Photos, words: Words, generator: np.random.Generator
) -> None:
    """Stage 2: the head alone, on superpixel features of the frozen tower."""
    regions = region_features(student, photos)
    bias = torch.zeros(len(words.vectors), requires_grad=True)
    groups = [
        {"params": list(student.visual.head.parameters()), "weight_decay": HEAD_DECAY},
        {"params": [bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=HEAD_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, HEAD_RATE, total_steps=HEAD_STEPS, pct_start=0.1
    )
    student.norm.train()
    order: list[int] = []
    for step in range(HEAD_STEPS):
        if len(order) < HEAD_BATCH:
            order = generator.permutation(len(regions)).tolist()
        chosen = [order.pop() for _ in range(HEAD_BATCH)]
        levels, shares, owners = draw_regions(regions, chosen, generator)
        vectors = student.align(levels, dropout=0.2)
        found = (vectors @ words.vectors.T / TEMPERATURE + bias).softmax(dim=-1)
        sums = torch.zeros(HEAD_BATCH, TEXT_DIM).index_add(0, owners, vectors * shares[:, None])
        with torch.no_grad():
            known = student.visual.tower.classifier(levels[:, :LAST_CHANNELS]).softmax(dim=-1)
        names = names_loss(vectors, words.prototypes, known)
        captions = pick_captions(words, chosen, generator)
        loss = (
            cover_loss(found, owners, words.counts[chosen])
            + match_loss(F.normalize(sums, dim=-1), captions, captions[:0])
            + (names * shares).sum() / HEAD_BATCH
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"head {step}: loss {loss.item():.3f}", flush=True)
    student.norm.eval()


def draw_view(photos: Photos, index: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random crop [3, 224, 224] in 0..1, flipped, recoloured; superpixels [196] of its cells."""
    side = int(PHOTO_SIDE * math.sqrt(generator.uniform(0.45, 1)))
    top, left = generator.integers(0, PHOTO_SIDE - side + 1, 2)
    pixels = photos.pixels[index][top : top + side, left : left + side].copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    image = F.interpolate(image, size=(CROP_SIDE, CROP_SIDE), mode="bilinear", antialias=True)[0]
    num = CROP_SIDE // STRIDE
    centres = (np.arange(num) + 0.5) * side / num
    scale = SEGMENT_SIDE / PHOTO_SIDE
    rows, columns = ((top + centres) * scale).astype(int), ((left + centres) * scale).astype(int)
    segments = torch.from_numpy(photos.segments[index][np.ix_(rows, columns)])
    if generator.random() < 0.5:
        image, segments = image.flip(-1), segments.flip(-1)
    image = image * generator.uniform(0.7, 1.3) + generator.uniform(-0.1, 0.1)
    gray = image.mean(dim=0, keepdim=True)
    image = (gray + (image - gray) * generator.uniform(0.6, 1.3)).clamp(0, 1)
    return image, segments.flatten()


def agree_loss(logs: Tensor, regions: Tensor, means: Tensor, allowed: Tensor) -> Tensor:
    """Per cell: cross-entropy of cells' log p [M, W] to their region's; allowed: [R, W] factors."""
    target = means.detach().clamp(min=1e-8) * allowed
    target = target / target.sum(dim=-1, keepdim=True)
    return -(target[regions] * logs).sum(dim=-1)


def tower_loss(
    student: Student, original: Student, words: Words, bias: Tensor,
    views: list[tuple[Tensor, Tensor]], chosen: list[int], agree: bool,
    generator: np.random.Generator,
) -> Tensor:  # fmt: skip
    """Sum of the five losses; the first len(chosen) views are captioned photos."""
    num = len(chosen)
    with torch.no_grad():
        cells, early = student.low(torch.stack([image for image, _ in views]))
        _, kept_logits = original(cells, early)
        known = kept_logits.softmax(dim=-1)
    levels, logits = student(cells, early)
    per_photo = levels.shape[1]
    vectors = student.align(levels.flatten(0, 1), dropout=0.1)
    names = names_loss(vectors, words.prototypes, known.flatten(0, 1)).mean()
    keep = F.kl_div(logits.log_softmax(dim=-1), known, reduction="none").sum(dim=-1).mean()
    logs = (vectors @ words.vectors.T / TEMPERATURE + bias).log_softmax(dim=-1)
    keys = torch.stack([s for _, s in views]) + torch.arange(len(views))[:, None] * 100_000
    unique, regions, areas = keys.flatten().unique(return_inverse=True, return_counts=True)
    owners = unique // 100_000
    means = torch.zeros(len(unique), logs.shape[1]).index_add(0, regions, logs.exp())
    means = means / areas[:, None]
    captioned = owners < num
    counts = words.counts[chosen]
    loss = names + keep + cover_loss(means[captioned], owners[captioned], counts)
    photos = F.normalize(vectors.view(len(views), per_photo, -1)[:num].mean(dim=1), dim=-1)
    others = generator.choice(len(words.captions), NUM_NEGATIVES, replace=False)
    negatives = torch.stack([words.captions[i][0] for i in others])
    captions = pick_captions(words, chosen, generator)
    loss = loss + MATCH_WEIGHT_TOWER * match_loss(photos, captions, negatives)
    if agree:
        allowed = torch.ones_like(means)
        allowed[captioned] = torch.where(counts > 0, 1.0, UNMENTIONED)[owners[captioned]]
        weights = torch.where(captioned, 1.0, UNLABELLED_WEIGHT)[regions]
        loss = loss + (agree_loss(logs, regions, means, allowed) * weights).mean()
    return loss


def average_into(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """Exponential moving average of all floating tensors, in place."""
    for kept, new in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        if kept.dtype.is_floating_point:
            kept.lerp_(new.detach(), 1 - momentum)


def draw_batch(order: list[int], num: int, total: int, generator: np.random.Generator) -> list[int]:
    """Next photos of an endless shuffled run through all; `order` is refilled in place."""
    if len(order) < num:
        order[:0] = generator.permutation(total).tolist()
    return [order.pop() for _ in range(num)]


def train_tower(
    student: Student, photos: Photos, plain: Photos, words: Words, generator: np.random.Generator
) -> Student:
    """Stage 3: stages 4 to 6 of the tower and the head; returns the averaged student."""
    original, averaged = copy.deepcopy(student), copy.deepcopy(student)
    tower = student.visual.tower
    tower.requires_grad_(False)
    trained = [*tower.blocks[FIRST_TRAINED:].parameters(), *tower.conv_head.parameters()]
    trained += tower.bn2.parameters()
    for parameter in trained:
        parameter.requires_grad_(True)
    bias = torch.zeros(len(words.vectors), requires_grad=True)
    head = [*student.visual.head.parameters(), bias]
    groups = [
        {"params": trained, "lr": TOWER_RATE, "weight_decay": 0.01},
        {"params": head, "lr": TOWER_HEAD_RATE, "weight_decay": 0.02},
    ]
    optimizer = torch.optim.AdamW(groups)

    def rate(step: int) -> float:
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, step / TOWER_STEPS)))
        return min(1, (step + 1) / 50) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order: list[int] = []
    plain_order: list[int] = []
    for step in range(TOWER_STEPS):
        chosen = draw_batch(order, TOWER_BATCH, len(photos.pixels), generator)
        extra = draw_batch(plain_order, UNLABELLED_BATCH, len(plain.pixels), generator)
        views = [draw_view(photos, index, generator) for index in chosen]
        views += [draw_view(plain, index, generator) for index in extra]
        student.norm.train()
        agree = step >= AGREE_FROM
        loss = tower_loss(student, original, words, bias, views, chosen, agree, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        average_into(averaged, student, min(MOMENTUM, (step + 1) / (step + 10)))
        if step % 10 == 0:
            print(f"tower {step}: loss {loss.item():.3f}", flush=True)
    return averaged.eval()


@torch.no_grad()
def everyday_vectors(student: Student, photos: Photos, seed: int) -> tuple[Tensor, Tensor]:
    """Centres [128, 384] of the head's vectors on every 12th photo, and the log of their shares."""
    samples = []
    for index in range(0, len(photos.pixels), 12):
        image = torch.from_numpy(photos.pixels[index]).permute(2, 0, 1)[None].float() / 255
        vectors = student.align(student(*student.low(image))[0][0], dropout=0.0)
        picked = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(index))[:60]
        samples.append(vectors[picked])
    means = KMeans(NUM_GENERIC, n_init=1, random_state=seed).fit(torch.cat(samples).numpy())
    counts = torch.from_numpy(np.bincount(means.labels_, minlength=NUM_GENERIC)).float()
    centres = torch.from_numpy(means.cluster_centers_).float()
    return F.normalize(centres, dim=-1), (counts / counts.sum()).log()


def export(student: Student, words: Words, photos: Photos, path: Path, seed: int) -> None:
    """Write a checkpoint in float16."""
    visual = student.visual
    visual.head.mean.copy_(student.norm.running_mean)
    visual.head.scale.copy_((student.norm.running_var + student.norm.eps).rsqrt())
    visual.prototypes.copy_(words.prototypes)
    state = {
        f"visual.{name.removeprefix('tower.')}": value
        for name, value in visual.state_dict().items()
        if not name.endswith(".num_batches_tracked")
    }
    state["generic"], state["generic_log_share"] = everyday_vectors(student, photos, seed)
    write_checkpoint(path, {name: value.half() for name, value in state.items()}, CARD)


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description="Train mini-base.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    generator = np.random.default_rng(arguments.seed)
    rows = [json.loads(row) for row in (arguments.data / "captioned/captions.jsonl").open()]
    words = read_language(
        MiniText(CONFIG).eval(), [row["captions"] for row in rows], arguments.wordnet
    )
    print(f"{len(words.vectors)} nouns", flush=True)
    folder = arguments.data / "captioned" / "images"
    photos = load_photos([folder / row["image"] for row in rows], crop=False)
    plain_paths = sorted((arguments.data / "unlabeled" / "images").iterdir())
    plain = load_photos(plain_paths, crop=True)
    torch.manual_seed(arguments.seed)  # the head's first weights and dropout
    student = Student()
    train_head(student, photos, words, generator)
    student = train_tower(student, photos, plain, words, generator)
    export(student, words, photos, arguments.output, arguments.seed)


if __name__ == "__main__":
    main()
