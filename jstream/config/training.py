"""What a training run is made of: objective, stages, adapters, mesh, and the run itself."""

import dataclasses
import re

from jstream.config.checks import ConfigError, require_positive
from jstream.config.model import ModelConfig, ProtocolConfig

STATE_LOSSES = ("ce", "fixed", "focal", "focal_released", "class_balanced", "silence_balanced", "live")
OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "muon")
DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "xla", "cudnn", "splash")
REMATS = ("none", "dots", "layer")


def _require_one_of(where: str, options: tuple[str, ...], found: str) -> None:
    if found not in options:
        raise ConfigError(f"{where}: expected {', '.join(options[:-1])} or {options[-1]}, found {found!r}")


def _require_patterns(where: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{where}: {pattern!r} is no regular expression: {error}") from None


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What training minimises (`training.losses`).

    Attributes:
        states: how the cross entropy of state tokens is weighted: `ce` (not at all), `fixed`, `focal` (Streamo's
            paper), `focal_released` (its published code), `class_balanced`, `silence_balanced` or `live`
            (VideoLLM-online).
        gamma: exponent of the focal weight.
        alpha: whether the focal losses also balance the states by how often they occur.
        fixed: the weight of each state, in the order of `Protocol.decision_ids`.
        beta: β of the class-balanced loss.
        silence: w, the weight of silence in LIVE's loss.
        balance: whether states are counted over the `batch`, all devices and parts of it, or in each `sample`.
        words: weight of the auxiliary loss that names what each frame token shows.
        happenings: weight of the auxiliary loss that names, at every decision, the events in progress and just over.
        replies: weight of the language objective itself; 0 trains the vision tower alone.
    """

    states: str = "focal"
    gamma: float = 2.0
    alpha: bool = True
    fixed: tuple[float, ...] = (0.3, 1.3, 2.0)
    beta: float = 0.999
    silence: float = 1.0
    balance: str = "batch"
    words: float = 0.0
    happenings: float = 0.0
    replies: float = 1.0

    def __post_init__(self):
        _require_one_of("objective.states", STATE_LOSSES, self.states)
        _require_one_of("objective.balance", ("batch", "sample"), self.balance)
        if min(self.gamma, self.silence, self.words, self.happenings, self.replies, *self.fixed) < 0:
            raise ConfigError(f"objective: expected weights ≥ 0, found {self}")
        if not 0 <= self.beta < 1:
            raise ConfigError(f"objective.beta: expected a number from 0 to below 1, found {self.beta}")

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
        steps: optimizer steps; 0 where `epochs` says how many.
        rows: packed rows that a step learns from, over all devices.
        frames: frame slots a row.
        tokens: token slots a row; 0 where only the vision tower is trained.
        epochs: passes over the annotations, in place of steps.
        accumulate: parts in which the rows go through the model, one after the other; the gradient is that of all.
        min_seconds, max_seconds: length of the generated videos.
        seconds_per_event: from one event to the next in them, on average.
        learning_rate: peak of the stage.
        decay: share of the stage, at its end, over which the rate falls to `final_rate` of the peak.
        falling: how it falls, `linear` or `cosine`.
        freeze: regular expressions; params whose whole path fits one stay as they are, bit for bit.
        weights: task → share of the dialogues; () is the source's own mix.
    """

    steps: int
    rows: int
    frames: int
    tokens: int
    objective: ObjectiveConfig = ObjectiveConfig()
    epochs: float = 0.0
    accumulate: int = 1
    min_seconds: int = 20
    max_seconds: int = 120
    seconds_per_event: float = 6.0
    learning_rate: float = 1e-3
    decay: float = 0.0
    final_rate: float = 0.1
    falling: str = "linear"
    freeze: tuple[str, ...] = ()
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        require_positive(self, "stage", but=("tokens", "steps"))
        _require_one_of("stage.falling", ("linear", "cosine"), self.falling)
        if bool(self.steps) == (self.epochs > 0):
            raise ConfigError(
                f"stage: expected steps or epochs > 0, and the other 0, found {self.steps}, {self.epochs}"
            )
        if self.rows % self.accumulate:
            raise ConfigError(f"stage: expected accumulate to divide rows, found {self.accumulate} and {self.rows}")
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
        _require_patterns("stage.freeze", self.freeze)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen kernels (arXiv 2106.09685): x W + (alpha / rank) · dropout(x) A B.

    Attributes:
        rank: r; 0 is no adapters.
        alpha: scale.
        dropout: of the adapter's input.
        modules: names of the linear layers that have one, wherever they occur in the decoder.
    """

    rank: int = 0
    alpha: float = 256.0
    dropout: float = 0.05
    modules: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    )  # fmt: skip

    def __post_init__(self):
        if self.rank < 0 or not 0 <= self.dropout < 1 or self.alpha <= 0:
            raise ConfigError(f"lora: expected rank ≥ 0, alpha > 0 and dropout from 0 to below 1, found {self}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices to each axis of the mesh (`jstream.sharding`); −1 is what the others leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ConfigError(f"mesh: expected sizes ≥ 1, one of them −1 at most, found {self}")


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
    """Where published weights lie: folders or hub ids.

    Attributes:
        checkpoint: the model, or an adapter.
        llm, vision: what an adapter is for; "" is what its own files name.
        fresh: regular expressions; params whose whole path fits one start fresh all the same when training starts.
    """

    checkpoint: str = ""
    llm: str = ""
    vision: str = ""
    fresh: tuple[str, ...] = ()

    def __post_init__(self):
        _require_patterns("weights.fresh", self.fresh)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A model, its language, where its weights are published, and how it is trained.

    Attributes:
        stages: of training; () where the config only opens published weights.
        weights: what training starts from; fresh params where no checkpoint is named.
        lora: adapters that are trained in the place of the kernels beside which they stand.
        mesh: how the devices are used.
        dialogues: annotations with their videos beside them, or a prepared folder (`data.annotations` says which
            files); "" generates the world on the fly.
        validation_dialogues: of other videos; "" is other worlds, or none where `dialogues` is given.
        fps: frames a second that are sampled from videos.
        warmup: steps of linear warm-up in each stage; below 1, their share of the stage.
        optimizer: `adamw`; `adamw_8bit` (its moments in 8 bits); `adafactor` (no first moment, the second factored);
            `muon` (matrices by orthogonalised momentum, the rest by AdamW).
        param_dtype: of the params that are trained, and of their gradients.
        compute_dtype: of the forward pass, and of the params that are never trained.
        remat: what the backward pass computes again instead of keeping it: `none`, all but the products of matrices
            (`dots`), or everything inside a decoder layer (`layer`).
        attention: `xla`, `cudnn` (GPU), `splash` (TPU), or `auto`: what suits the devices.
        workers: processes that decode or render; 0 works in the training process.
        validate_every: steps from one validation to the next; 0 is none.
        validation_rows: of a validation.
        best: metric of the validation whose best checkpoint is kept as well, such as `state_accuracy`; "" is none.
    """

    model: ModelConfig
    protocol: ProtocolConfig
    stages: tuple[StageConfig, ...] = ()
    weights: WeightsConfig = WeightsConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    tokenizer: str = ""
    dialogues: str = ""
    validation_dialogues: str = ""
    fps: float = 1.0
    seed: int = 0
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    beta2: float = 0.98
    clip_norm: float = 1.0
    warmup: float = 50.0
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    workers: int = 1
    log_every: int = 20
    save_every: int = 200
    keep: int = 2
    validate_every: int = 0
    validation_rows: int = 16
    best: str = ""

    def __post_init__(self):
        require_positive(self, "config", but=("seed", "workers", "validate_every"))
        _require_one_of("optimizer", OPTIMIZERS, self.optimizer)
        _require_one_of("param_dtype", DTYPES, self.param_dtype)
        _require_one_of("compute_dtype", DTYPES, self.compute_dtype)
        _require_one_of("remat", REMATS, self.remat)
        _require_one_of("attention", ATTENTIONS, self.attention)
        if self.fps <= 0:
            raise ConfigError(f"fps: expected a number above 0, found {self.fps}")
        if self.warmup < 0:
            raise ConfigError(f"warmup: expected steps, or a share of each stage below 1, found {self.warmup}")
        if self.stages and self.model.decoder.int8:
            raise ConfigError("model.decoder.int8: expected weights that can be trained, found int8 ones")
        if self.best and not self.validate_every:
            raise ConfigError("best: expected validate_every > 0, as the best checkpoint is chosen by a validation")
        if self.dialogues and any(stage.objective.needs_names for stage in self.stages):
            raise ConfigError(
                "dialogues: only the world has the labels of the auxiliary losses; set words and happenings of every "
                "stage's objective to 0, and leave out stages without tokens"
            )
