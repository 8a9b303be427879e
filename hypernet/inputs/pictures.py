"""Photos as a program has them: files, Pillow's pictures, arrays and tensors, one or several."""

import os
from collections.abc import Iterable

import numpy as np
from PIL import Image
from torch import Tensor

PhotoLike = str | os.PathLike | Image.Image | np.ndarray | Tensor
"""A file; or a picture in memory: Pillow's, or numbers as `to_pillow` takes them."""


def list_photos(photos: PhotoLike | Iterable[PhotoLike]) -> list[PhotoLike]:
    """One photo or several as a list; an array or tensor with four axes holds several."""
    if isinstance(photos, np.ndarray | Tensor):
        return list(photos) if photos.ndim == 4 else [photos]
    return [photos] if isinstance(photos, PhotoLike) else list(photos)


def to_pillow(picture: Image.Image | np.ndarray | Tensor, name: str) -> Image.Image:
    """A picture in memory as one of Pillow's.

    Args:
        picture: numbers are ``(h, w, 3)`` or ``(3, h, w)``, bytes or floats in [0, 1].
        name: what messages call it.

    Raises:
        ValueError: numbers of another shape, type or range.
    """
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, Tensor):
        tensor = picture.detach().cpu()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    else:
        array = picture
    if array.ndim == 3 and array.shape[-1] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise ValueError(f"{name} has shape {tuple(picture.shape)}; pass (h, w, 3) or (3, h, w)")
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        if not (np.issubdtype(array.dtype, np.floating) and low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(
                f"{name} holds {array.dtype} from {low:g} to {high:g}; pass bytes (uint8), or floats from 0 to 1"
            )
        array = (array * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))
