"""The shapes and choices a model, a protocol and a training run are made from, as frozen dataclasses.

They are built once, at the edge: from a locked `ml_collections.ConfigDict` (`configs/*.py`) or from the `config.json`
of a checkpoint. Everything below receives plain frozen values and reads no flags.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line."""


def _require_positive(config: Any, where: str, but: tuple[str, ...] = ()) -> None:
    """Checks the whole numbers of a config: > 0, or ≥ 0 for those named in `but`."""
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), 0 if field.name in but else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise ConfigError(f"{where}.{field.name}: expected a whole number ≥ {least}, found {value}")


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
        _require_positive(self, "vision", but=("stem_width", "grid", "num_layers"))
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
        _require_positive(self, "vision", but=("window_size", "num_positions"))
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
        _require_positive(self, "decoder", but=("deep_layers",))
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


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What training minimises.

    Attributes:
        states: `ce`, `focal` (the paper's) or `focal_released` (the published code's) on the state tokens.
        gamma: exponent of the focal weight.
        words: weight of the auxiliary loss that names what each frame token shows.
        happenings: weight of the auxiliary loss that names, at every decision, the events in progress and just over.
        replies: weight of the language objective itself; 0 trains the vision tower alone.
    """

    states: str = "focal"
    gamma: float = 2.0
    words: float = 0.0
    happenings: float = 0.0
    replies: float = 1.0

    def __post_init__(self):
        if self.states not in ("ce", "focal", "focal_released"):
            raise ConfigError(f"objective.states: expected ce, focal or focal_released, found {self.states!r}")
        if min(self.gamma, self.words, self.happenings, self.replies) < 0:
            raise ConfigError(f"objective: expected weights ≥ 0, found {self}")

    @property
    def needs_decoder(self) -> bool:
        return self.replies > 0 or self.happenings > 0

    @property
    def needs_names(self) -> bool:
        """Whether the source must give the auxiliary labels, which only the world has."""
        return self.words > 0 or self.happenings > 0


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a curriculum: so many steps on rows of one static shape.

    Attributes:
        steps: optimizer steps.
        rows: packed rows a batch.
        frames: frame slots a row.
        tokens: token slots a row; 0 where only the vision tower is trained.
        min_seconds, max_seconds: length of the generated videos.
        seconds_per_event: from one event to the next in them, on average.
        learning_rate: peak of the stage.
        decay: share of the stage, at its end, over which the rate falls linearly to `final_rate` of the peak.
        train_vision: whether the vision tower learns; else it stays as it is, bit for bit.
        weights: task → share of the dialogues; () is the source's own mix.
    """

    steps: int
    rows: int
    frames: int
    tokens: int
    objective: ObjectiveConfig = ObjectiveConfig()
    min_seconds: int = 20
    max_seconds: int = 120
    seconds_per_event: float = 6.0
    learning_rate: float = 1e-3
    decay: float = 0.0
    final_rate: float = 0.1
    train_vision: bool = True
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        _require_positive(self, "stage", but=("tokens",))
        if self.objective.needs_decoder != bool(self.tokens):
            raise ConfigError("stage: expected token slots exactly where replies or happenings are learned")
        if not 10 <= self.min_seconds <= self.max_seconds:
            raise ConfigError(
                f"stage: expected 10 ≤ min_seconds ≤ max_seconds, found {self.min_seconds}, {self.max_seconds}"
            )
        if self.tokens and self.frames < self.min_seconds:
            raise ConfigError(f"stage: expected frames ≥ min_seconds, found {self.frames} and {self.min_seconds}")
        if not 0 <= self.decay <= 1 or not 0 <= self.final_rate <= 1:
            raise ConfigError("stage: expected decay and final_rate between 0 and 1")
        if self.learning_rate <= 0 or self.seconds_per_event <= 0:
            raise ConfigError("stage: expected learning_rate > 0 and seconds_per_event > 0")


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
    """Where published weights lie: folders or hub ids.

    Attributes:
        checkpoint: the model, or an adapter.
        llm, vision: what an adapter is for; "" is what its own files name.
    """

    checkpoint: str = ""
    llm: str = ""
    vision: str = ""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A model, its language, where its weights are published, and how it is trained.

    Attributes:
        stages: of training; () where the config only opens published weights.
        dialogues: a raw-schema file with its videos beside it; "" generates the world on the fly.
        warmup: steps of linear warm-up.
        optimizer: `adamw` or `muon` (matrices by orthogonalised momentum, the rest by AdamW).
        workers: processes that decode or render; 0 works in the training process.
    """

    model: ModelConfig
    protocol: ProtocolConfig
    stages: tuple[StageConfig, ...] = ()
    weights: WeightsConfig = WeightsConfig()
    tokenizer: str = ""
    dialogues: str = ""
    seed: int = 0
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    beta2: float = 0.98
    clip_norm: float = 1.0
    warmup: int = 50
    workers: int = 1
    log_every: int = 20
    save_every: int = 200
    keep: int = 2

    def __post_init__(self):
        _require_positive(self, "config", but=("seed", "workers", "warmup"))
        if self.optimizer not in ("adamw", "muon"):
            raise ConfigError(f"optimizer: expected adamw or muon, found {self.optimizer!r}")
        if self.stages and self.model.decoder.int8:
            raise ConfigError("model.decoder.int8: expected weights that can be trained, found int8 ones")
        if self.dialogues and any(stage.objective.needs_names for stage in self.stages):
            raise ConfigError(
                "dialogues: only the world has the labels of the auxiliary losses; set words and happenings of every "
                "stage's objective to 0, and leave out stages without tokens"
            )


def from_dict(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Builds the frozen dataclass `cls` from nested mappings, strictly.

    Raises:
        ConfigError: an unknown key (names the nearest known one), a missing key or a value of the wrong type.
    """
    where = where or cls.__name__
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected an object, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise ConfigError(
                f"{where}: unknown key {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(hints)}")
            )
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise ConfigError(f"{where}: missing key {missing[0]!r}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint == VisionConfig:  # which of them, the value says itself
        named = value.get("tower") if isinstance(value, Mapping) else getattr(value, "tower", None)
        hint = QwenVisionConfig if named in QWEN_TOWERS else SiglipConfig
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else from_dict(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        kinds = [items[0]] * len(value) if len(items) == 2 and items[1] is Ellipsis else list(items)
        if len(kinds) != len(value):
            raise ConfigError(f"{where}: expected {len(kinds)} values, found {value!r}")
        return tuple(
            _convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, types.UnionType) or not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`: nested dicts and lists that JSON can hold."""
    return dataclasses.asdict(config)
