"""What a model is made of: vision tower, decoder, and the language of a turn."""

import dataclasses
import math

from jstream.config.checks import ConfigError, require_positive


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """A SigLIP vision transformer, a two-layer projector, and how patches become frame tokens.

    Attributes:
        tower: always `siglip`.
        image_size: pixels, both sides of the square frame.
        patch_size: pixels, both sides of a patch.
        stem_width: channels of a small stem before the patches (4 px cells, then a 3 × 3 convolution); 0 is SigLIP's
            own linear patches.
        temporal_patch_size: frames a patch sees: 1, or 2 for this frame and the one before it.
        grid: the patches are averaged to grid × grid tokens.
        pooled_token: whether the attention-pooled token comes first; M = grid² + pooled_token.
        token_positions: whether a learned vector tells the decoder which of the M tokens each is; SigLIP's own patch
            positions hardly survive the averaging.
    """

    tower: str = "siglip"
    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    norm_eps: float = 1e-6
    stem_width: int = 0
    temporal_patch_size: int = 1
    grid: int = 3
    pooled_token: bool = True
    token_positions: bool = False

    def __post_init__(self):
        if self.tower != "siglip":
            raise ConfigError(f"vision.tower: expected siglip, {' or '.join(QWEN_TOWERS)}, found {self.tower!r}")
        require_positive(self, "vision", but=("stem_width", "grid", "num_layers"))
        if not self.tokens_per_frame:
            raise ConfigError("vision: expected a grid, the pooled token or both, found neither")
        if self.temporal_patch_size > 2:
            raise ConfigError(f"vision: expected temporal_patch_size 1 or 2, found {self.temporal_patch_size}")
        if self.width % self.num_heads:
            raise ConfigError(f"vision: expected width divisible by num_heads, found {self.width}, {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision: expected image_size divisible by patch_size, found {self.image_size}, {self.patch_size}"
            )
        if self.stem_width and self.patch_size % 4:
            raise ConfigError(f"vision: expected patch_size divisible by 4 behind a stem, found {self.patch_size}")

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width in pixels of the frames that the tower takes."""
        return (self.image_size, self.image_size)

    @property
    def num_images(self) -> int:
        """Images that a patch sees, this frame's the last."""
        return self.temporal_patch_size

    @property
    def tokens_per_frame(self) -> int:
        return self.grid**2 + self.pooled_token

    @property
    def feature_width(self) -> int:
        """Of what the tower makes of a frame: [M, feature_width]."""
        return self.width

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of frame tokens, for multimodal rotary positions; with a pooled token they are one row."""
        return (1, self.tokens_per_frame) if self.pooled_token else (self.grid, self.grid)


QWEN_TOWERS = ("qwen2_5", "qwen3")


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """The vision tower of Qwen2.5-VL or Qwen3-VL, merger included.

    Frames keep their aspect: they are resized to whole cells of `patch_size · merge_size` pixels within a pixel budget,
    and M is the number of these cells. One stream has one size, which `jstream.Model.for_frames` chooses.

    Attributes:
        tower: `qwen2_5` (window attention, RMSNorm, SwiGLU) or `qwen3` (learned positions, LayerNorm, deep features).
        frame_height, frame_width: pixels of the resized frames.
        patch_size: pixels, both sides of a patch.
        temporal_patch_size: images a patch sees; a frame stands for all of them.
        merge_size: patches to a side of the cell that becomes one frame token.
        mlp_dim: hidden width of the feed-forward.
        out_width: D of the decoder.
        window_size: pixels, both sides of an attention window; 0 where every layer attends everywhere.
        full_attention_layers: layers that attend everywhere, where there are windows.
        num_positions: learned positions of a square grid that is resampled to the frame's; 0 where there are none.
        deep_layers: layers whose features also enter the decoder, behind its first layers (DeepStack).
        image_mean, image_std: of red, green and blue, from 0 to 1; frames are normalised with them.
        min_pixels, max_pixels: the budget for `frame_height · frame_width`.
    """

    tower: str = "qwen2_5"
    frame_height: int = 224
    frame_width: int = 420
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    width: int = 1280
    num_layers: int = 32
    num_heads: int = 16
    mlp_dim: int = 3420
    out_width: int = 2048
    norm_eps: float = 1e-6
    window_size: int = 112
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31)
    num_positions: int = 0
    deep_layers: tuple[int, ...] = ()
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    min_pixels: int = 3136
    max_pixels: int = 100_352

    def __post_init__(self):
        if self.tower not in QWEN_TOWERS:
            raise ConfigError(f"vision.tower: expected siglip, {' or '.join(QWEN_TOWERS)}, found {self.tower!r}")
        require_positive(self, "vision", but=("window_size", "num_positions"))
        if self.frame_height % self.cell or self.frame_width % self.cell:
            raise ConfigError(
                f"vision: expected frames of whole cells of {self.cell} px, "
                f"found {self.frame_height} × {self.frame_width}"
            )
        if self.width % (4 * self.num_heads):
            raise ConfigError(f"vision: expected heads of 4 · n dimensions, found {self.width} for {self.num_heads}")
        if self.window_size % self.cell:
            raise ConfigError(f"vision: expected windows of whole cells of {self.cell} px, found {self.window_size}")
        if math.isqrt(self.num_positions) ** 2 != self.num_positions:
            raise ConfigError(f"vision: expected num_positions to be a square, found {self.num_positions}")
        for name in ("full_attention_layers", "deep_layers"):
            if any(not 0 <= layer < self.num_layers for layer in getattr(self, name)):
                raise ConfigError(f"vision.{name}: expected layers 0 … {self.num_layers - 1}")
        if self.min_pixels > self.max_pixels:
            raise ConfigError(f"vision: expected min_pixels ≤ max_pixels, found {self.min_pixels}, {self.max_pixels}")

    @property
    def cell(self) -> int:
        """Pixels to a side of what becomes one frame token."""
        return self.patch_size * self.merge_size

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width in pixels of the frames that the tower takes."""
        return (self.frame_height, self.frame_width)

    @property
    def num_images(self) -> int:
        """Images that the tower is given for a frame: the frame alone, also where a patch sees it twice."""
        return 1

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of frame tokens."""
        return (self.frame_height // self.cell, self.frame_width // self.cell)

    @property
    def tokens_per_frame(self) -> int:
        return math.prod(self.token_grid)

    @property
    def feature_width(self) -> int:
        """Of what the tower makes of a frame, mergers included: [M, feature_width]."""
        return (1 + len(self.deep_layers)) * self.out_width

    def for_frames(self, height: int, width: int) -> "QwenVisionConfig":
        """The config for frames of this size: whole cells, the aspect kept, within the pixel budget.

        The rule is `smart_resize` of Qwen's image processor.

        Raises:
            ConfigError: for an empty frame, or one more than 200 times as long as wide.
        """
        if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
            raise ConfigError(f"frames: expected an aspect of at most 200 : 1, found {height} × {width}")
        rounded = [round(side / self.cell) * self.cell for side in (height, width)]
        if math.prod(rounded) > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rounded = [max(1, math.floor(side / shrink / self.cell)) * self.cell for side in (height, width)]
        elif math.prod(rounded) < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (height * width))
            rounded = [math.ceil(side * stretch / self.cell) * self.cell for side in (height, width)]
        return dataclasses.replace(self, frame_height=rounded[0], frame_width=rounded[1])


VisionConfig = SiglipConfig | QwenVisionConfig


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama family: Llama 3, Qwen2.5, Qwen3 or a tiny one, by these numbers alone.

    Attributes:
        qkv_bias: biases on the query, key and value projections (Qwen2.5).
        qk_norm: RMSNorm over the dimensions of each query and key head (Qwen3).
        tie_embeddings: the head is the transposed embedding.
        mrope_section: pairs of head dimensions turned by time, height and width (Qwen2.5-VL: 16, 24, 24); () is plain
            rotary positions.
        mrope_interleaved: the three take turns over the pairs (Qwen3-VL) instead of a section each.
        deep_layers: the first layers behind which features of the frames are added (Qwen3-VL).
        int8: the kernels of linear layers are int8 with a scale for each column; to stream with, not to train.
    """

    vocab_size: int = 128_256
    width: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp_dim: int = 14_336
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False
    deep_layers: int = 0
    int8: bool = False

    def __post_init__(self):
        require_positive(self, "decoder", but=("deep_layers",))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"decoder: expected num_heads divisible by num_kv_heads, found {self.num_heads}, {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"decoder: expected an even head_dim, found {self.head_dim}")
        if self.deep_layers > self.num_layers:
            raise ConfigError(f"decoder: expected deep_layers ≤ {self.num_layers}, found {self.deep_layers}")
        if self.mrope_section and 2 * sum(self.mrope_section) != self.head_dim:
            raise ConfigError(
                f"decoder: expected mrope_section to sum to head_dim / 2, found {self.mrope_section}, {self.head_dim}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Vision tower and decoder."""

    vision: SiglipConfig | QwenVisionConfig = SiglipConfig()
    decoder: DecoderConfig = DecoderConfig()

    def __post_init__(self):
        if isinstance(self.vision, QwenVisionConfig):
            if self.vision.out_width != self.decoder.width:
                raise ConfigError(
                    f"model: expected vision.out_width to be the decoder's width {self.decoder.width}, "
                    f"found {self.vision.out_width}"
                )
            if len(self.vision.deep_layers) != self.decoder.deep_layers:
                raise ConfigError(
                    f"model: expected as many vision.deep_layers as the decoder takes, {self.decoder.deep_layers}, "
                    f"found {len(self.vision.deep_layers)}"
                )


@dataclasses.dataclass(frozen=True)
class ProtocolConfig:
    """The language of a turn. The strings are the base model's chat template; their special tokens are in the
    tokenizer.

    Attributes:
        name: `streamo`, `joyai` or `live`.
        system: the system prompt; "" renders no system message.
        frame_token: the placeholder that a frame token replaces.
        frame_interval: what stands between frames (`live`).
    """

    name: str = "streamo"
    system: str = ""
    system_open: str = "<|im_start|>system\n"
    system_close: str = "<|im_end|>\n"
    user_open: str = "<|im_start|>user\n"
    user_close: str = "<|im_end|>\n"
    assistant_open: str = "<|im_start|>assistant\n"
    assistant_close: str = "<|im_end|>\n"
    frame_open: str = "<|vision_start|>"
    frame_close: str = "<|vision_end|>"
    frame_token: str = "<|image_pad|>"
    frame_interval: str = ""

    def __post_init__(self):
        if self.name not in ("streamo", "joyai", "live"):
            raise ConfigError(f"protocol: expected the name streamo, joyai or live, found {self.name!r}")
        for key in ("user_open", "assistant_open", "assistant_close", "frame_token"):
            if not getattr(self, key):
                raise ConfigError(f"protocol: expected some text for {key}, found none")
