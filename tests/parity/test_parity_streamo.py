"""A Streamo session on a Qwen model: the tokens of the published template, the images of the published processor, and
turn by turn through the cache the numbers of one transformers forward over the whole conversation."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from PIL import Image

from jstream.config import ConfigError, ProtocolConfig, QwenVisionConfig
from jstream.data.frames import fit
from jstream.data.video import Frame, open_video
from jstream.model import Model
from jstream.protocols import joyai, make_protocol, streamo
from jstream.protocols.protocol import Turn
from jstream.protocols.streamo import STATE_TOKENS, SYSTEM_PROMPT
from jstream.protocols.tokenizer import Tokenizer
from jstream.streaming.session import Session
from jstream.weights.added_tokens import complete
from jstream.weights.hf import load_params, read_config
from tests.parity.test_parity_models import loud

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

BUDGETS = (100_352, 50_176)  # pixels; Streamo's, and half of it
# behind the last token that the published vocabulary has; JoyAI's here behind Streamo's
STATE_IDS = {"streamo": (151665, 151666, 151667), "joyai": (151668, 151669)}
IMAGE_ID = 151655
VISION = {
    "qwen2_5": QwenVisionConfig(),
    "qwen3": QwenVisionConfig(
        tower="qwen3", frame_width=416, patch_size=16, window_size=0, full_attention_layers=(),
        image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5),
    ),
}  # fmt: skip


def real_frames(shared_data, number):
    """The first frames of some real videos of different sizes and aspects."""
    frames = {}
    for path in sorted((shared_data / "videos").rglob("*")):
        if path.suffix not in (".mp4", ".mkv", ".webm", ".mov", ".avi") or len(frames) == number:
            continue
        try:
            with open_video(path, fps=1) as video:
                image = next(iter(video)).image
        except Exception:  # some are broken on purpose
            continue
        if image.shape[:2] not in [seen.shape[:2] for seen in frames.values()]:
            frames[path.name] = image
    assert len(frames) == number
    return frames


def processor(kind, max_pixels):
    patch, mean = (14, None) if kind == "qwen2_5" else (16, [0.5] * 3)
    options = {} if mean is None else dict(image_mean=mean, image_std=mean)
    return pil.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=max_pixels, patch_size=patch, **options)


def pixels_of(processed, vision):
    """The processor's patches put together again: f32 [H, W, 3], normalised."""
    (rows, columns), m, p = vision.token_grid, vision.merge_size, vision.patch_size
    x = processed["pixel_values"].reshape(rows, columns, m, m, 3, 2, p, p)[:, :, :, :, :, 0]
    return x.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * m * p, columns * m * p, 3)


@pytest.mark.parametrize("max_pixels", BUDGETS)
@pytest.mark.parametrize("kind", ["qwen2_5", "qwen3"])
def test_frames_are_within_a_grey_level_of_the_published_processor(shared_data, kind, max_pixels):
    vision = dataclasses.replace(VISION[kind], max_pixels=max_pixels)
    for name, image in real_frames(shared_data, 12).items():
        geometry = vision.for_frames(*image.shape[:2])
        processed = processor(kind, max_pixels)(images=[Image.fromarray(image)], return_tensors="np")
        grid = processed["image_grid_thw"][0].tolist()
        assert grid == [1, *(side // vision.patch_size for side in geometry.frame_size)], name
        theirs = pixels_of(processed, geometry) * np.asarray(vision.image_std) + np.asarray(vision.image_mean)
        assert np.abs(theirs * 255 - fit(image, geometry)).max() <= 1.001, name


def test_frames_of_any_size_get_the_published_grid():
    rng = np.random.default_rng(0)
    for vision in VISION.values():
        for _ in range(400):
            height, width = (int(2 ** rng.uniform(4, 12)) for _ in range(2))
            if max(height, width) > 200 * min(height, width):
                continue
            expected = pil.smart_resize(height, width, vision.cell, vision.min_pixels, vision.max_pixels)
            assert vision.for_frames(height, width).frame_size == tuple(expected), (height, width)
    with pytest.raises(ConfigError, match="200"):
        vision.for_frames(4000, 10)


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    inner = tokenizers.Tokenizer.from_file(str(shared_data / "tokenizers/qwen2_5/tokenizer.json"))
    inner.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in STATE_TOKENS])
    return Tokenizer(inner)


def reference(kind):
    ids = dict(image_token_id=IMAGE_ID, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
    text = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
        vocab_size=151_936, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = dict(depth=3, hidden_size=32, num_heads=2, intermediate_size=40, out_hidden_size=64)
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3])
    if kind == "qwen2_5":
        text |= dict(rope_parameters=rope)
        config = transformers.Qwen2_5_VLConfig(
            vision_config=vision | dict(fullatt_block_indexes=[1]), text_config=text, tie_word_embeddings=True, **ids
        )
        return loud(transformers.Qwen2_5_VLForConditionalGeneration(config))
    text |= dict(head_dim=16, rope_parameters=rope | dict(mrope_section=[4, 2, 2], mrope_interleaved=True))
    vision |= dict(num_position_embeddings=36, deepstack_visual_indexes=[0, 1])
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **ids)
    return loud(transformers.Qwen3VLForConditionalGeneration(config))


class Watched(Session):
    """A session that remembers every token it fed."""

    fed: list[int]

    def _begin(self):
        self.fed = []
        super()._begin()

    def _do(self, wish):
        self.fed += wish.tokens
        return super()._do(wish)


@pytest.mark.parametrize(
    ("kind", "language"),
    [("qwen2_5", streamo.PUBLISHED), ("qwen3", streamo.PUBLISHED), ("qwen3", joyai.PUBLISHED)],
    ids=["qwen2_5", "qwen3", "joyai"],
)
def test_turn_by_turn_equals_one_forward_of_the_published_conversation(tmp_path, tokenizer, kind, language):
    llm = reference(kind)
    llm.save_pretrained(tmp_path)
    processor(kind, BUDGETS[1]).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    tokenizer, _ = complete(tokenizer, language)  # the model has rows for them
    protocol = make_protocol(language, tokenizer, config.vision.tokens_per_frame)
    assert protocol.decision_ids == STATE_IDS[language.name]
    model = Model(config, load_params(tmp_path, config, jnp.float32), protocol).for_frames(90, 120)

    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (90, 120, 3), np.uint8) for _ in range(6)]
    session = Watched(model, capacity=2048, max_new_tokens=4)
    queries, scores = {0: "What happens?", 3: "And <|im_end|> now?"}, []
    for index, image in enumerate(images):
        if index in queries:
            session.ask(queries[index])
        session.threshold = 0.0 if index in (2, 4) else 1.0  # speaks in some turns, whatever the weights say
        event = session.see(Frame(float(index), image))
        scores.append([*event.probs.values()])

    processed = processor(kind, BUDGETS[1])(images=images, return_tensors="pt")
    tokens = torch.tensor([session.fed])
    with torch.no_grad():
        out = llm(
            input_ids=tokens,
            pixel_values=processed["pixel_values"],
            image_grid_thw=processed["image_grid_thw"],
            mm_token_type_ids=(tokens == IMAGE_ID).int(),
        )
    decided = [
        i for i in range(len(session.fed)) if session.fed[i - 1 : i + 1] == tokenizer.encode_template("assistant\n")
    ]
    assert len(decided) == len(images)
    expected = out.logits[0, decided][:, list(STATE_IDS[language.name])].softmax(-1).numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_a_stream_is_the_published_template_token_for_token(tokenizer):
    vision = QwenVisionConfig(frame_height=56, frame_width=84)
    protocol = make_protocol(ProtocolConfig(system=SYSTEM_PROMPT), tokenizer, vision.tokens_per_frame)
    queries = {0: "What happens?", 3: "And now?"}
    states, replies = [0, 1, 2, 0, 2], {2: "A cup is put down.", 4: "Nothing."}
    turns = [Turn(i, i + 1, queries.get(i), state, replies.get(i)) for i, state in enumerate(states)]
    text = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
    for index, turn in enumerate(turns):
        asked = f"{turn.query}\n" if turn.query else ""
        frame = f"<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>"
        said = STATE_TOKENS[turn.state] + (f" {turn.reply}" if turn.reply else "")
        text += f"<|im_start|>user\n{asked}<{index}s-{index + 1}s>\n{frame}<|im_end|>\n"
        text += f"<|im_start|>assistant\n{said}<|im_end|>\n"
    rendered = protocol.render(turns).tokens.tolist()
    assert rendered == tokenizer.encode_template(text)
