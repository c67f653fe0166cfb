"""The LIVE protocol: frames in a row, a comma after each that deserves no word.

    system · [ frame , frame , frame ] Assistant: reply · [ frame ] User: question Assistant: reply · [ frame , …

(VideoLLM-online, arXiv 2406.11816, section 3; formats as in the repository showlab/videollm-online,
`models/tokenization_live.py` and `demo/inference.py`, for weights with ten tokens a frame.) A question is heard after
the frame of its turn and answered at once. On its own the model speaks where the comma is improbable.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jstream.config import ProtocolConfig
from jstream.data.dialogue import DialogueError
from jstream.protocols.protocol import RESPONSE, SILENCE, STATE, TEXT, Rendering, Turn, lay_labels
from jstream.protocols.tokenizer import Tokenizer

# What VideoLLM-online's weights are trained with (`models/arguments_live.py`); a format, verbatim.
SYSTEM_PROMPT = (
    "A multimodal AI assistant is helping users with some activities."
    " Below is their conversation, interleaved with the list of video frames received by the assistant."
)
THRESHOLD = 0.725  # of the comma, in the published demo
PUBLISHED_FPS = 2.0  # that its data are sampled at
_MAX_FRAMES = 100_000  # of a conversation, half a day; a damaged number is not a reason to fill the memory

# The words between turns, over Llama 3's tokenizer (`models/tokenization_live.py`, v1+).
PUBLISHED = ProtocolConfig(
    name="live", system=SYSTEM_PROMPT, system_open="<|begin_of_text|>", system_close="\n", user_open="\nUser:",
    user_close="", assistant_open="\nAssistant:", assistant_close="<|eot_id|>", frame_open="\n[", frame_close="]",
    frame_token="<v>", frame_interval=",",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SilenceScores:
    """f32 [2]: the probability of silence among all tokens, and that of the most probable other token."""

    silence_id: int

    def __call__(self, logits: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(logits)
        return jnp.stack([probs[self.silence_id], jnp.max(probs.at[self.silence_id].set(0.0))])


class Live:
    """The protocol over one tokenizer and one frame geometry.

    Args:
        config: the words between turns, and the system prompt.
        tokenizer: holds the frame token as a special token, past the vocabulary of the base model.
        tokens_per_frame: M.
    """

    name: ClassVar[str] = "live"
    own_tokens: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ProtocolConfig, tokenizer: Tokenizer, tokens_per_frame: int):
        self.config, self.tokenizer, self.tokens_per_frame = config, tokenizer, tokens_per_frame
        encode = tokenizer.encode_template
        self.frame_id = tokenizer.special(config.frame_token)
        (self.silence_id,) = encode(config.frame_interval)
        self.close = encode(config.assistant_close + config.frame_open)
        self.end_id = self.close[0]
        self.speak = encode(config.frame_close + config.assistant_open)
        self.scores = SilenceScores(self.silence_id)
        self.decision_ids = (self.silence_id, self.speak[0])
        self.unspoken_ids: tuple[int, ...] = ()  # as published: a reply is whatever is most probable
        self.prefix = encode(config.system_open + config.system + config.system_close + config.frame_open)

    def open_turn(self, turn: Turn) -> list[int]:
        """The frame; what opens or parts frames has ended the turn before."""
        return [self.frame_id] * self.tokens_per_frame

    def probs(self, scores: Sequence[float]) -> dict[str, float]:
        return {"silence": scores[0], "response": 1.0 - scores[0]}

    def decide(self, scores: Sequence[float], threshold: float | None = None, asked: bool = False) -> int:
        """Speaks when asked, when silence is less probable than THRESHOLD, and when another token is more probable.

        Args:
            scores: of silence and of the best other token.
            threshold: of the probability to speak, 1 − p(silence), in place of the published 1 − THRESHOLD.
            asked: whether a question came with the frame.
        """
        least = THRESHOLD if threshold is None else 1.0 - threshold
        spoken = asked or scores[0] < least or scores[1] > scores[0]
        return RESPONSE if spoken else SILENCE

    def open_reply(self, turn: Turn) -> list[int]:
        """Closes the row of frames, says the question if there is one, and gives the assistant the word."""
        return self.speak if turn.query is None else self._ask(turn.query, self.config.assistant_open)

    def _ask(self, query: str, then: str) -> list[int]:
        """One text: the end of a question and the newline behind it merge."""
        return self.tokenizer.encode(f"{self.config.frame_close}{self.config.user_open} {query}{then}")

    def encode_reply(self, text: str) -> list[int]:
        return self.tokenizer.encode(" " + text)

    def decode_reply(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens).strip()

    def close_turn(self, state: int, reply: Sequence[int] = ()) -> list[int]:
        """Tokens from a decision that no question forced to the end of its turn."""
        return [*self.speak, *reply, *self.close] if state == RESPONSE else [self.silence_id]

    def end_turn(self, turn: Turn, reply: Sequence[int] = ()) -> list[int]:
        """`close_turn` of a turn that is over; a question without a reply stands alone, as in `render`."""
        if turn.state == RESPONSE:
            return [*self.open_reply(turn), *reply, *self.close]
        return [self.silence_id] if turn.query is None else self._ask(turn.query, self.config.frame_open)

    def render(self, turns: Sequence[Turn]) -> Rendering:
        """Renders a dialogue for training.

        Learned are, after each frame, the comma or what ends the row of frames before a reply; the words that give the
        assistant the word, the reply and its end. Not learned, unless a turn says so, is the decision of one with a
        question, which no one can foresee. Standby is silence. A question without a reply in its turn stands alone; a
        live stream always answers.
        """
        tokens, labelled = list(self.prefix), []
        decisions, ends = [], []
        word = len(self.tokenizer.encode(self.config.assistant_open.lstrip()))  # tokens that give it to the assistant
        for turn in turns:
            tokens += self.open_turn(turn)
            decision = len(tokens) - 1
            decisions.append(decision)
            if turn.learn_state if turn.learn_state is not None else turn.query is None:
                ends_row = turn.state == RESPONSE or turn.query is not None
                labelled.append((decision, self.decision_ids[ends_row], STATE))
            if turn.reply is not None:
                opening = self.open_reply(turn)
                known = 1 if turn.query is None else len(opening) - word  # tokens that are decided or asked
                spoken = [*opening[known:], *self.encode_reply(turn.reply), self.end_id]
                tokens += opening[:known]
                if turn.learn_reply:
                    labelled += [(len(tokens) + i - 1, label, TEXT) for i, label in enumerate(spoken)]
                tokens += [*spoken, *self.close[1:]]
            elif turn.query is not None:
                tokens += self._ask(turn.query, self.config.frame_open)
            else:
                tokens.append(self.silence_id)
            ends.append(len(tokens))
        return lay_labels(tokens, self.frame_id, labelled, decisions, ends)


def turns_of_chat(conversation: Sequence[Mapping[str, Any]], fps: float = PUBLISHED_FPS) -> list[Turn]:
    """Reads a conversation as VideoLLM-online's data hold it.

    Messages have a `role`: `stream` with `num_frames`, `user` and `assistant` with `content`. `learn` of a stream is
    whether its frames are learned, or how many of them from the first on; of an assistant, whether the reply is. A
    system message is passed over: it is `ProtocolConfig.system`.

    Raises:
        DialogueError: names the message that does not fit, such as words before any frame.
    """
    turns: list[Turn] = []
    for number, message in enumerate(conversation):
        known = message if isinstance(message, Mapping) and isinstance(message.get("learn", False), int) else {}
        role, content, learn = known.get("role"), known.get("content"), known.get("learn", False)
        last, num_frames = turns[-1] if turns else None, known.get("num_frames")
        if role == "stream" and isinstance(num_frames, int) and 0 <= num_frames <= _MAX_FRAMES - len(turns):
            start, end = len(turns), len(turns) + num_frames
            learned = end if learn is True else start + learn
            turns += [Turn(i / fps, (i + 1) / fps, learn_state=i < learned) for i in range(start, end)]
        elif role == "user" and isinstance(content, str) and last and last.query is None and last.reply is None:
            turns[-1] = dataclasses.replace(last, query=content)
        elif role == "assistant" and isinstance(content, str) and last and last.reply is None:
            turns[-1] = dataclasses.replace(last, state=RESPONSE, reply=content, learn_reply=bool(learn))
        elif role != "system" or number:
            raise DialogueError(
                f"conversation: message {number}: expected frames, a question or a reply behind frames, "
                f"found {message!r:.80}"
            )
    return turns
