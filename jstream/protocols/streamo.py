"""The Streamo protocol: every frame is a user turn, every decision an assistant turn that opens with a state token.

    system · { user: [question] <{i}s-{i+1}s> frame · assistant: </Silence> | </Standby> | </Response> reply }*

("Streaming Video Instruction Tuning", arXiv 2512.21334; formats as in the repository maifoundations/Streamo,
`scripts/convert_streaming_video.py`.) This file alone knows that language: it renders a whole dialogue with its labels
for training, the next chunk of a live one for streaming, and reads decisions and spans back. Languages that differ in
their words alone inherit from it (`protocols/joyai.py`).
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jstream.config import ProtocolConfig
from jstream.data.dialogue import Dialogue, DialogueError, Query, Response
from jstream.protocols.protocol import RESPONSE, SILENCE, STANDBY, STATE, STATES, TEXT, Rendering, Turn, lay_labels
from jstream.protocols.tokenizer import Tokenizer

STATE_TOKENS = ("</Silence>", "</Standby>", "</Response>")  # of STATES, in order

# The prompt Streamo's weights are trained with (maifoundations/Streamo, `scripts/convert_streaming_video.py`); a
# format, verbatim.
SYSTEM_PROMPT = """
You are a helpful assistant specializing in streaming video analysis. 
You will receive input frame by frame, each labeled with absolute time intervals 
in the exact format <Xs-Ys> (e.g., <0s-1s>). Follow these rules precisely:

1. Use </Silence> when:
   - No relevant event has started, OR
   - The current input is irrelevant to the given question.  

2. Use </Standby> when:
   - An event is in progress but has not yet completed, OR
   - The current input is relevant but the question cannot yet be answered.  

3. Use </Response> only when:
   - An event has fully concluded, OR
   - The available information is sufficient to fully answer the question.
   Provide a complete description at this point.  

Do not provide partial answers or speculate beyond the given information.  
Whenever you deliver an answer, begin with </Response>.
"""  # noqa: W291
PUBLISHED = ProtocolConfig(name="streamo", system=SYSTEM_PROMPT)  # over Qwen's chat template
MAX_PIXELS = 100_352  # a frame's budget in its scripts: 128 cells of Qwen2.5-VL


def label_of(turn: Turn) -> str:
    """The seconds a turn stands for, as the model reads them: `<12s-13s>`, or with up to three decimals."""
    return f"<{round(turn.start, 3):.12g}s-{round(turn.end, 3):.12g}s>"


@dataclasses.dataclass(frozen=True)
class StateScores:
    """The probability of each state that the protocol knows, f32 [N], from the logits f32 [V] behind a turn."""

    decision_ids: tuple[int, ...]

    def __call__(self, logits: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits[jnp.asarray(self.decision_ids)])


class Streamo:
    """The protocol over one tokenizer and one frame geometry.

    Args:
        config: chat template and system prompt.
        tokenizer: holds the state tokens and the frame token as special tokens.
        tokens_per_frame: M.

    Attributes:
        state_tokens: of STATES, in order; a state that is not known has the token of one that is.
        known: indices into STATES of the states that have a token of their own, in order.
    """

    name: ClassVar[str] = "streamo"
    own_tokens: ClassVar[tuple[str, ...]] = STATE_TOKENS
    state_tokens: ClassVar[tuple[str, ...]] = STATE_TOKENS
    label = staticmethod(label_of)

    def __init__(self, config: ProtocolConfig, tokenizer: Tokenizer, tokens_per_frame: int):
        self.config = config
        self.tokenizer = tokenizer
        self.tokens_per_frame = tokens_per_frame
        self.state_ids = tuple(tokenizer.special(token) for token in self.state_tokens)
        self.frame_id = tokenizer.special(config.frame_token)
        self.close = tokenizer.encode_template(config.assistant_close)
        self.end_id = self.close[0]
        self.decision_ids = tuple(dict.fromkeys(self.state_ids))
        self.known = tuple(self.state_ids.index(token) for token in self.decision_ids)
        self.scores = StateScores(self.decision_ids)
        # what a reply can hold: text and its end, but no other special token
        self.unspoken_ids = tuple(sorted(set(tokenizer.specials.values()) - {self.end_id}))
        self.prefix: list[int] = []
        if config.system:
            # one text: "\n" before and in the prompt merge, and the state tokens it explains are the tokens themselves
            self.prefix = tokenizer.encode_template(config.system_open + config.system + config.system_close)

    def open_turn(self, turn: Turn) -> list[int]:
        """Tokens from the end of the turn before up to where this turn's state is decided."""
        c, t = self.config, self.tokenizer
        label = self.label(turn) + "\n"
        return [
            *t.encode_template(c.user_open),
            *(t.encode_template(label) if turn.query is None else t.encode(f"{turn.query}\n{label}")),
            *t.encode_template(c.frame_open),
            *[self.frame_id] * self.tokens_per_frame,
            *t.encode_template(c.frame_close + c.user_close + c.assistant_open),
        ]

    def open_reply(self, turn: Turn) -> list[int]:
        """Tokens between a decision to speak and the first word."""
        return [self.state_ids[RESPONSE]]

    def close_turn(self, state: int, reply: Sequence[int] = ()) -> list[int]:
        """Tokens of a decision, its reply (`encode_reply`) and the turn's end."""
        return [self.state_ids[state], *reply, *self.close]

    def end_turn(self, turn: Turn, reply: Sequence[int] = ()) -> list[int]:
        """`close_turn` of a turn that is over."""
        return self.close_turn(turn.state, reply)

    def encode_reply(self, text: str) -> list[int]:
        return self.tokenizer.encode(" " + text)

    def decode_reply(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens).strip()

    def render(self, turns: Sequence[Turn]) -> Rendering:
        """Renders a dialogue for training.

        Learned are the state of every turn, every token of a reply and the token that ends it. The end after a silent
        turn is not: the live stream writes it itself.
        """
        tokens = list(self.prefix)
        labelled: list[tuple[int, int, int]] = []  # position, label, kind
        decisions, ends = [], []
        for turn in turns:
            tokens += self.open_turn(turn)
            decisions.append(len(tokens) - 1)
            reply = self.encode_reply(turn.reply) if turn.reply is not None else []
            if turn.learn_state is not False:
                labelled.append((len(tokens) - 1, self.state_ids[turn.state], STATE))
            if turn.state == RESPONSE and turn.learn_reply:
                labelled += [(len(tokens) + i, label, TEXT) for i, label in enumerate([*reply, self.end_id])]
            tokens += self.close_turn(turn.state, reply)
            ends.append(len(tokens))
        return lay_labels(tokens, self.frame_id, labelled, decisions, ends)

    def probs(self, scores: Sequence[float]) -> dict[str, float]:
        return {STATES[state]: p for state, p in zip(self.known, scores, strict=True)}

    def decide(self, scores: Sequence[float], threshold: float | None = None, asked: bool = False) -> int:
        """The state: the most probable one, or with a threshold RESPONSE exactly when its probability reaches it.

        Args:
            scores: of the known states, in order; RESPONSE is the last.
            threshold: in [0, 1], or None.
            asked: does not matter here: the model has read the question and may wait.
        """
        if threshold is None:
            return self.known[int(np.argmax(scores))]
        return RESPONSE if scores[-1] >= threshold else self.known[int(np.argmax(scores[:-1]))]


# ----------------------------------------------------------------------------------------- dialogues to turns and back


def turns_of(dialogue: Dialogue, num_frames: int, fps: float = 1.0, official: bool = False) -> list[Turn]:
    """Lays a dialogue over frames.

    A time t names the turn that ends at it: frame ⌈t·fps⌉ − 1. A span is STANDBY from the turn of its start to the turn
    of its end, and the reply comes in the turn after; a reply with a time and no span comes in its turn. What lies
    outside the video is left out.

    The published converter has four faults, which are mended unless `official` asks for its exact output: it repeats
    the first question at frame 0, where it leaks what will be asked; a later response overwrites an earlier one (here
    replies of one turn are joined, and STANDBY never hides a reply); fps scales only strings with a fraction (here
    every time is scaled); and its sampling interval ⌊video fps / fps⌋ drifts (`data.video` samples by presentation
    time).

    Args:
        dialogue: times in seconds.
        num_frames: F.
        fps: sampled frames a second.
        official: the published converter's result, for times that are whole seconds.
    """
    frame_of = lambda time: max(0, (int(time) if official else math.ceil(time * fps - 1e-6)) - 1)
    queries: dict[int, str] = {}
    for query in dialogue.queries:
        frame = frame_of(query.time)
        queries[frame] = query.text if official or frame not in queries else f"{queries[frame]}\n{query.text}"
    if official and dialogue.queries:
        queries.setdefault(0, dialogue.queries[0].text)

    states = [SILENCE] * num_frames
    replies: dict[int, str] = {}
    for response in dialogue.responses:
        if response.start is not None and response.end is not None:
            frame = frame_of(response.end) + 1
            for i in range(frame_of(response.start), min(frame, num_frames)):
                if official or i not in replies:
                    states[i] = STANDBY
                if official:
                    replies.pop(i, None)
        else:
            frame = frame_of(response.time)
        if frame < num_frames:
            joined = not official and frame in replies
            replies[frame] = f"{replies[frame]} {response.text}" if joined else response.text
            states[frame] = RESPONSE
    return [
        Turn(i / fps, (i + 1) / fps, queries.get(i), states[i], replies.get(i)) for i in range(num_frames)
    ]  # fmt: skip


def to_stream_format(dialogue: Dialogue, num_frames: int, fps: float = 1.0, official: bool = False) -> dict[str, Any]:
    """Writes a dialogue in Streamo's training format: messages with one `<stream>` placeholder a turn."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}]
    for turn in turns_of(dialogue, num_frames, fps, official):
        label = f"{label_of(turn)}\n<stream>"
        messages.append({"role": "user", "content": label if turn.query is None else f"{turn.query}\n{label}"})
        state = STATE_TOKENS[turn.state]
        messages.append({"role": "assistant", "content": state if turn.reply is None else f"{state} {turn.reply}"})
    record: dict[str, Any] = {"messages": messages, "videos": [dialogue.video]}
    known = {"video_name": dialogue.video.rsplit("/", 1)[-1], "task_type": dialogue.task, "source": dialogue.source}
    return record | {key: value for key, value in known.items() if value}


_LABEL = re.compile(r"\n?<(\d+(?:\.\d+)?)s-(\d+(?:\.\d+)?)s>\n?$")


def turns_of_stream_format(record: Any) -> list[Turn]:
    """Reads Streamo's training format, with or without time labels: a turn for each `<stream>`, one a second.

    Turns are as the messages say, a question that is repeated and standby that ends in no reply included. A
    `</Response>` without words is silence.

    Raises:
        DialogueError: names the message that does not fit.
    """
    messages = record.get("messages") if isinstance(record, dict) else None
    videos = record.get("videos") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not isinstance(videos, list) or len(videos) != 1:
        raise DialogueError("stream format: expected 'messages' and one entry under 'videos'")
    turns: list[Turn] = []
    query, seen = None, False  # of the next turn; whether its frame has come
    for number, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(content, str) or role not in ("system", "user", "assistant"):
            raise DialogueError(f"stream format: message {number}: expected a role and text, found {message!r:.80}")
        if role != "system" and seen != (role == "assistant"):
            raise DialogueError(
                f"stream format: message {number}: expected user and assistant by turns, found {content!r:.80}"
            )
        if role == "user":
            text = content.removesuffix("<stream>")
            if text == content:
                raise DialogueError(
                    f"stream format: message {number}: expected a user turn that ends in <stream>, "
                    f"found {content!r:.80}"
                )
            query, seen = _LABEL.sub("", text).strip() or None, True
        elif role == "assistant":
            state = next((i for i, token in enumerate(STATE_TOKENS) if content.startswith(token)), None)
            if state is None:
                raise DialogueError(
                    f"stream format: message {number}: expected a state token first, found {content!r:.80}"
                )
            reply = content.removeprefix(STATE_TOKENS[RESPONSE]).strip() or None if state == RESPONSE else None
            state = SILENCE if state == RESPONSE and reply is None else state
            turns.append(Turn(len(turns), len(turns) + 1, query, state, reply))
            seen = False
    return turns


def from_stream_format(record: Any) -> tuple[Dialogue, int]:
    """Reads Streamo's training format, with or without time labels.

    A run of `</Standby>` up to a reply becomes the reply's span; runs that end in no reply are not part of a dialogue.

    Returns:
        The dialogue and its number of frames, one a second.

    Raises:
        DialogueError: names the message that does not fit.
    """
    turns = turns_of_stream_format(record)
    queries = tuple(Query(turn.query, frame + 1) for frame, turn in enumerate(turns) if turn.query is not None)
    responses, standby = [], None  # frame at which the present run of standby began
    for frame, turn in enumerate(turns):
        if turn.reply is not None:
            span = Response(turn.reply, start=standby + 1, end=frame) if standby is not None else None
            responses.append(span or Response(turn.reply, time=frame + 1))
        standby = (frame if standby is None else standby) if turn.state == STANDBY else None
    task, source = (str(record.get(key) or "") for key in ("task_type", "source"))
    return Dialogue(str(record["videos"][0]), queries, tuple(responses), task, source), len(turns)
