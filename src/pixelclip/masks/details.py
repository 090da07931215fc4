"""What is known of masks besides their pixels: SA-1B's fields, kept as they came."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pixelclip.errors import DataError
from pixelclip.masks.records import parse_json
from pixelclip.masks.runs import PhotoMasks

MAX_DETAILS = 2**22  # characters, of a photo; SA-1B's have about 25 thousand

Fields = dict[str, object]


class Details(NamedTuple):
    """What the text of a photo says.

    Attributes:
        masks: of each mask; None: nothing.
        document: of the photo, see `PhotoMasks`; None: nothing.
    """

    masks: list[Fields] | None = None
    document: Fields | None = None


def details_text(masks: PhotoMasks) -> str:
    """What is known of a photo's masks as JSON; empty if that is nothing.

    An array with an object per mask, or the photo's document with that array in it; or, where
    that would be no JSON (NaN) or above `MAX_DETAILS`, the number of masks that have lost theirs.
    """
    if masks.details is None and masks.document is None:
        return ""
    own = list(masks.details or ())
    try:
        content = own if masks.document is None else {**masks.document, "annotations": own}
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError):
        return str(masks.count)
    return text if len(text) <= MAX_DETAILS else str(masks.count)


def without_counts(masks: PhotoMasks) -> PhotoMasks:
    """The same, with null for the counts in the details that are those `to_rle` gives."""
    if masks.details is None:
        return masks
    details = []
    for fields, text in zip(masks.details, masks.to_rle(), strict=True):
        segmentation = fields.get("segmentation")
        if isinstance(segmentation, dict) and segmentation.get("counts") == text.decode():
            fields = {**fields, "segmentation": {**segmentation, "counts": None}}
        details.append(fields)
    return replace(masks, details=tuple(details))


def sa1b_document(masks: PhotoMasks, image: Fields, first_id: int = 1) -> Fields:
    """The masks in SA-1B's layout; a document that was read comes out as it was.

    Args:
        masks: with their details.
        image: what to say of the photo, unless the masks bring it.
        first_id: of the annotations, likewise.
    """
    details = masks.details or ({},) * masks.count
    texts = [text.decode() for text in masks.to_rle()]
    own = [
        _with_counts(fields, text) if "segmentation" in fields else {**new, **fields}
        for fields, text, new in zip(
            details, texts, annotations(masks, texts, first_id), strict=True
        )
    ]
    return {**({"image": image} if masks.document is None else masks.document), "annotations": own}


def annotations(masks: PhotoMasks, texts: list[str], first_id: int) -> list[Fields]:
    """What can be said of masks whose codes these are, in the fields of SA-1B."""
    size = [masks.height, masks.width]
    scores = [float(str(score)) for score in masks.scores]  # 0.9, not 0.8999999761581421
    return [
        {
            "id": first_id + index,
            "segmentation": {"size": size, "counts": text},
            "area": area,
            "bbox": [float(edge) for edge in box],
            "predicted_iou": score,
        }
        for index, (text, area, box, score) in enumerate(
            zip(texts, masks.areas().tolist(), masks.boxes().tolist(), scores, strict=True)
        )
    ]


def _with_counts(fields: Fields, text: str) -> Fields:
    segmentation = fields.get("segmentation")
    if isinstance(segmentation, dict) and segmentation.get("counts", "") is None:
        return {**fields, "segmentation": {**segmentation, "counts": text}}
    return fields


def parse_details(text: str, count: int, path: Path) -> Details:
    """What the text of a photo with that number of masks says.

    Raises:
        DataError: it is no such text.
    """
    if not text:
        return Details()
    if len(text) > MAX_DETAILS:
        raise DataError(f"{path} is damaged: details of {len(text)} characters")
    content = parse_json(text.encode("utf-8", "surrogatepass"), path)
    if type(content) is int:
        return Details()
    document = content if isinstance(content, dict) else None
    own = content if document is None else document.get("annotations")
    is_whole = isinstance(own, list) and all(isinstance(fields, dict) for fields in own)
    if not isinstance(own, list) or not is_whole or len(own) != count:
        raise DataError(f"{path} is damaged: details of other than {count} masks")
    return Details(own, None if document is None else {**document, "annotations": None})
