"""SAM and its descendants through transformers: a photo once, then masks for points of it."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from pixelclip.backbones.sources import hub_in_reach
from pixelclip.checkpoint import read_json
from pixelclip.device import autocast, choose_device, wants_bfloat16
from pixelclip.errors import ModelError

CONFIG = "config.json"
HUB_FILES = [CONFIG, "preprocessor_config.json", "processor_config.json", "model*.safetensors",
             "model.safetensors.index.json"]  # fmt: skip
LARGEST = 65_536  # of any number in a config; the largest of published ones is a vocabulary's
MOST = 256  # of what each costs time to build; published models have at most 48 layers
COUNTED = ("layers", "blocks", "depth", "outputs")
SAVED = "give --checkpoint DIR, a folder that save_pretrained of model and processor wrote"


class Encoded(NamedTuple):
    """A photo after the image tower.

    Attributes:
        embeddings: what the model's forward pass takes in place of pixels.
        size: height and width of the photo.
        input_size: height and width that the photo has in the network's input.
        is_padded: whether the input is a square that goes on beyond the photo.
    """

    embeddings: dict[str, object]
    size: tuple[int, int]
    input_size: tuple[int, int]
    is_padded: bool


class PointModel:
    """A model that gives masks for points.

    Attributes:
        family: transformers' name of its kind, as `sam` or `sam2_video`.
        side: pixels of a side of the network's square input.
    """

    def __init__(self, name: str, model: Any, processor: Any, precision: str) -> None:
        self._name = name
        self._model = model
        self._processor = processor
        self._precision = precision
        self._device = next(model.parameters()).device
        self.family = str(model.config.model_type)
        self.side = _side(model.config.prompt_encoder_config.image_size)

    @torch.inference_mode()
    def encode(self, photo: UInt8[np.ndarray, "H W 3"]) -> Encoded | None:
        """A photo after the image tower; None if it is so thin that no row of it would be seen.

        Raises:
            ModelError: the model cannot be run.
        """
        height, width = photo.shape[:2]
        longest = self._processor.size.get("longest_edge")
        if longest and min(height, width) * longest < max(height, width) / 2:
            return None
        with self._one_line():
            # Without its format a photo of three rows would be taken for one of three channels.
            inputs = self._processor(
                images=[np.array(photo)],  # torch warns of arrays that cannot be written
                input_data_format="channels_last",
                return_tensors="pt",
            )
            pixels = inputs["pixel_values"].to(self._device)
            with autocast(self._device, self._precision):
                embeddings = self._model.get_image_embeddings(pixels)
        given = {"image_embeddings": embeddings}
        if isinstance(embeddings, tuple):  # SAM-HQ
            given = {"image_embeddings": embeddings[0], "intermediate_embeddings": embeddings[1]}
        is_padded = "reshaped_input_sizes" in inputs
        size = inputs["reshaped_input_sizes"][0].tolist() if is_padded else pixels.shape[-2:]
        return Encoded(given, (height, width), (int(size[0]), int(size[1])), is_padded)

    @torch.inference_mode()
    def ask(
        self, encoded: Encoded, points: Float64[np.ndarray, "P 2"]
    ) -> tuple[Float[Tensor, "M h w"], Float[Tensor, " M"]]:
        """Masks of points as small maps of logits, and the IoU that the model expects of them.

        A point has the same number of masks as another, and they follow each other. Points are
        (x, y) in the photo. transformers' own mask generation brings them to SAM 2's input with
        the photo's shape kept, as for SAM; but SAM 2 stretches photos to a square.

        Raises:
            ModelError: the model cannot be run.
        """
        scale = np.array(encoded.input_size) / encoded.size
        inputs = torch.from_numpy(points * scale[::-1]).float()[None, :, None].to(self._device)
        with self._one_line():
            with autocast(self._device, self._precision):
                output = self._model(
                    **encoded.embeddings,
                    input_points=inputs,
                    input_labels=torch.ones_like(inputs[..., 0], dtype=torch.int64),
                    multimask_output=True,
                )
            logits = output.pred_masks.float().flatten(0, 2)
            return logits, output.iou_scores.float().reshape(len(logits))

    @torch.inference_mode()
    def upscale(self, encoded: Encoded, logits: Float[Tensor, "M h w"]) -> Float[Tensor, "M H W"]:
        """Maps of logits in the size of the photo.

        Raises:
            ModelError: the model cannot be run.
        """
        padded = {"reshaped_input_sizes": [encoded.input_size]} if encoded.is_padded else {}
        with self._one_line():
            return self._processor.post_process_masks(
                [logits[None]], original_sizes=[encoded.size], binarize=False, **padded
            )[0][0]

    def _one_line(self) -> AbstractContextManager[None]:
        """Turn what transformers may raise into a ModelError."""
        return _model_errors(f"{self._name} cannot make masks")


def load_sam(
    name: str, *, checkpoint: str | None = None, device: str = "auto", precision: str = "auto"
) -> PointModel:
    """A model by its name on the hub, or from a folder.

    Only safetensors are read, and no code is taken from the hub.

    Args:
        name: of any model that transformers lists for mask generation.
        checkpoint: folder with the model and its processor, in place of the name.
        device: see `choose_device`.
        precision: see `pixelclip.device.autocast`.

    Raises:
        ModelError: there is no such model, or it makes no masks.
        ConfigError: the device or the precision is not available.
    """
    place = choose_device(device)
    wants_bfloat16(place, precision)
    folder = _local(Path(checkpoint)) if checkpoint is not None else _fetched(name)
    model, processor = _loaded(folder)
    return PointModel(checkpoint or name, model.to(place), processor, precision)


def _local(folder: Path) -> Path:
    """A folder of the user's that holds a model."""
    if not folder.is_dir():
        raise ModelError(f"no such folder: {folder}; {SAVED}")
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} holds no model, as it has no {CONFIG}; {SAVED}")
    return folder


def _fetched(name: str) -> Path:
    """The folder of the hub's cache with a model's files."""
    try:
        # transformers would retry without a network, and ask a bot to convert pickled weights.
        return Path(
            snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=not hub_in_reach())
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"cannot fetch {name}: no network and not in the cache; {SAVED}, or use --source"
            " superpixels, which needs no weights"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"the model hub has no {name!r}; {SAVED}") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"cannot fetch {name}: {_first_line(error)}") from error


def _loaded(folder: Path) -> tuple[Any, Any]:
    """The model of a folder, in float32 and frozen, and its processor of pictures."""
    config = read_json(folder / CONFIG)
    _check_kind(folder, config)
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForMaskGeneration

    options = {"local_files_only": True, "trust_remote_code": False}
    # What is built draws weights before it is given its own.
    with _model_errors(f"cannot load {folder}"), _quiet(), torch.random.fork_rng(devices=[]):
        processor = AutoImageProcessor.from_pretrained(folder, **options)
        _check_size(folder, AutoConfig.from_pretrained(folder, **options))
        model, report = AutoModelForMaskGeneration.from_pretrained(
            folder,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported
            output_loading_info=True,
            **options,
        )
    if misfits := sorted(str(key[0]) for key in report["mismatched_keys"]):
        raise ModelError(f"{folder} has weights of another size: {', '.join(misfits[:3])}")
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{folder} lacks weights of its model: {', '.join(missing[:3])}")
    side = _side(model.config.prompt_encoder_config.image_size)
    made = processor.size.get("longest_edge") or processor.size.get("height")
    if made != side:
        raise ModelError(
            f"{folder} does not fit together: its processor makes pictures of {made} pixels, its"
            f" network takes {side}"
        )
    return model.float().eval().requires_grad_(False), processor


def _check_kind(folder: Path, config: dict[str, object]) -> None:
    """Make sure that a model makes masks of points, and that its sizes can be believed."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES

    kind = str(config.get("model_type"))
    if kind not in MODEL_FOR_MASK_GENERATION_MAPPING_NAMES:
        raise ModelError(
            f"{folder} is a model of kind {kind}, which makes no masks of points; kinds that do:"
            f" {', '.join(sorted(MODEL_FOR_MASK_GENERATION_MAPPING_NAMES))}"
        )
    for name, number in _numbers(config):
        if number > (MOST if any(word in name for word in COUNTED) else LARGEST):
            raise ModelError(f"{folder}: {CONFIG} has {name} {number}; no model is so large")


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """The sizes of all numbers in a JSON value, each with the name that it stands under."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int | float):
        yield name, abs(value)


def _check_size(folder: Path, config: Any) -> None:
    """Make sure that the files can hold the model's weights: those they lack would be drawn."""
    from transformers import AutoModelForMaskGeneration

    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with torch.device("meta"):
        model = AutoModelForMaskGeneration.from_config(config)
    values = sum(weight.numel() for weight in model.parameters())
    if 0 < num_bytes < values:
        raise ModelError(
            f"{folder} has weights of {num_bytes} bytes, its model has {values} numbers: are its"
            " files complete?"
        )


def _side(size: int | Sequence[int]) -> int:
    """Pixels of a side of a network's square input, which a config may say twice."""
    return size if isinstance(size, int) else int(size[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers, whose switches are for the whole process."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_is_quiet = are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
        if has_bar and hub_is_quiet:
            disable_progress_bars()


@contextmanager
def _model_errors(what: str) -> Iterator[None]:
    """Turn whatever a library raises on a strange model into one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """What an error says, at most 160 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
