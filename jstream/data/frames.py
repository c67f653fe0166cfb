"""`Frame`, and frames to the size a vision tower takes: a square with black bars for SigLIP, the own aspect for Qwen.

And frames as they are kept in files: JPEG within a budget of pixels.
"""

import io
import math
from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from jstream.config import QwenVisionConfig, VisionConfig

MAX_JPEG_PIXELS = 2**24  # that `from_jpeg` opens: a few bytes can claim 2^32


@dataclass(frozen=True)
class Frame:
    """One sampled picture.

    Attributes:
        time: seconds since the first frame of the source; the time of the tick (of the frame itself at native rate).
        image: [H, W, 3] uint8 RGB, read-only: ticks that repeat a picture share it.
    """

    time: float
    image: np.ndarray


def fit(image: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """A frame as the tower was trained to see it.

    Args:
        image: [H, W, 3] uint8.
        vision: says the size and the way there.

    Returns:
        [*vision.frame_size, 3] uint8; the image itself if it has that size.
    """
    if isinstance(vision, QwenVisionConfig):
        return resize(image, *vision.frame_size)
    return letterbox(image, vision.image_size)


def clip_of(image: np.ndarray, before: np.ndarray | None, vision: VisionConfig) -> np.ndarray:
    """What the tower is given for a frame: the frame, behind the one before it where patches see two.

    Args:
        image, before: uint8 [H, W, 3]; a frame that opens a stream has none before it, and is its own.

    Returns:
        uint8 [H, W, 3 · num_images].
    """
    if vision.num_images == 1:
        return image
    return np.concatenate([image if before is None else before, image], axis=-1)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretches a picture with Pillow's bicubic filter, as Qwen-VL's image processor does.

    Raises:
        ValueError: the image is not uint8 [H, W, 3].
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"expected uint8 [H, W, 3], found {image.dtype} {image.shape}")
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def letterbox(image: np.ndarray, size: int) -> np.ndarray:
    """Scales the longer side to `size`, keeping the aspect, and centres the picture on black.

    As VideoLLM-online prepares its videos (`data/utils.py`: FFmpeg's bicubic filter, the shorter side rounded to an
    even number).

    Args:
        image: [H, W, 3] uint8.
        size: pixels of each side.

    Returns:
        [size, size, 3] uint8; the image itself if it has that size. Bit-exact.

    Raises:
        ValueError: the image is not as above, or size is below 1.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape or size < 1:
        raise ValueError(f"expected uint8 [H, W, 3] and a size above 0, found {image.dtype} {image.shape} and {size}")
    height, width = image.shape[:2]
    if height == width == size:
        return image
    longest = max(height, width)
    even = lambda side: size if side == longest else min(size, max(2, 2 * int(side * size / (2 * longest) + 0.5)))
    height, width = even(height), even(width)
    # RGB planes under the name of 4:4:4 planes: swscale filters each alone, where it would take RGB through YUV.
    planes = av.VideoFrame.from_ndarray(np.ascontiguousarray(image.transpose(2, 0, 1)), format="yuv444p")
    flags = int(Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT)
    scaled = planes.reformat(width, height, interpolation=flags, threads=1).to_ndarray()
    out = np.zeros((size, size, 3), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    out[top : top + height, left : left + width] = scaled.transpose(1, 2, 0)
    return out


def to_jpeg(image: np.ndarray, max_pixels: int, quality: int) -> bytes:
    """Encodes a frame as JPEG; one with more pixels than the budget is scaled down to it, its aspect kept.

    Args:
        image: [H, W, 3] uint8.
        max_pixels: for H · W.
        quality: Pillow's, 1 to 95; the colours are halved in both directions, as they are in the video.
    """
    height, width = image.shape[:2]
    if height * width > max_pixels:
        shrink = math.sqrt(max_pixels / (height * width))
        image = resize(image, max(1, int(height * shrink)), max(1, int(width * shrink)))
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=quality)
    return out.getvalue()


def from_jpeg(data: bytes | memoryview, max_pixels: int = MAX_JPEG_PIXELS) -> np.ndarray:
    """Decodes a JPEG of unknown origin.

    Args:
        max_pixels: for what it claims to be; nothing is decoded of one that claims more.

    Returns:
        [H, W, 3] uint8.

    Raises:
        ValueError: where it is no JPEG, is cut off, or claims more than `max_pixels`; one line.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
            if picture.width * picture.height > max_pixels:
                raise ValueError(f"{picture.width} × {picture.height} pixels")
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"expected a JPEG of at most {max_pixels} pixels, found {error}") from None
