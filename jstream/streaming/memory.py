"""Memory: the policy that bounds the cache of a long stream. What is kept, and how it reads when it is read again.

    append            everything, until the cache is full
    reprefill[:300]   the newest turns, as in Streamo's inference: once there are more, the oldest one goes at every
                      frame, what was asked is said again in the first turn that is left, and all of it is read anew
    last_frames[:4]   the newest frames, as in SimpleStream: read anew at every frame, with no word of what was said

A window of turns is a fresh prompt: positions start at 0, while the labels of turns and their frame tokens stay as they
were. The session (`session.py`) keeps the turns and feeds the prompt; what is here touches no device.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

import jax

from jstream.config import ConfigError
from jstream.protocols.protocol import RESPONSE, SILENCE, StreamProtocol, Turn

OFTEN_SAID = 16  # tokens of replies a turn to make room for; most turns are silent
MAX_STANDING = 2000  # tokens of questions that are said again


@dataclasses.dataclass(frozen=True)
class Memory:
    """A policy.

    Attributes:
        turns: how many turns a decision sees, its own included; None for all.
        words: whether what was said and decided is kept with them.
    """

    turns: int | None = None
    words: bool = True

    def grows(self, num_turns: int) -> bool:
        """Whether a prompt of so many turns only grows by the next one."""
        return self.words and (self.turns is None or num_turns < self.turns)


# Turns by default: `max_rounds` of maifoundations/Streamo, `inference.py` (its OVO-Bench script keeps 121: it drops one
# when there are more than max_rounds + 1); `recent_frames_only` of EvolvingLMMs-Lab/SimpleStream.
WINDOWS = {"reprefill": Memory(300), "last_frames": Memory(4, words=False)}


def parse_memory(text: str) -> Memory:
    """Reads `append`, `reprefill[:TURNS]` or `last_frames[:N]`.

    Raises:
        ConfigError: names what is expected.
    """
    found = re.fullmatch(r"(\w+)(?::([1-9]\d{0,5}))?", text)
    if text == "append":
        return Memory()
    if found is None or found[1] not in WINDOWS:
        raise ConfigError(f"memory: expected append, reprefill[:TURNS] or last_frames[:N], found {text!r}")
    policy = WINDOWS[found[1]]
    return dataclasses.replace(policy, turns=int(found[2])) if found[2] else policy


# ------------------------------------------------------------------------------------------------------------- capacity


def capacity_for(protocol: StreamProtocol, num_turns: int, queries: Iterable[str] = (), reply_tokens: int = 64) -> int:
    """Tokens a cache must hold for a stream of so many turns, whatever it says.

    Args:
        protocol: the language of the model.
        num_turns: frames.
        queries: all that will be asked.
        reply_tokens: of a reply in every turn, at most; less is a guess about how much is said.
    """
    label = Turn(1e6, 1e6 + 1)  # as long as labels get
    turn = len(protocol.open_turn(label)) + len(protocol.close_turn(RESPONSE)) + reply_tokens
    asked = sum(len(protocol.tokenizer.encode(f"{query}\n")) for query in queries)
    padding = len(protocol.open_turn(label)) + 128  # the last chunk is padded to its bucket
    return len(protocol.prefix) + num_turns * turn + asked + padding


def window_capacity(memory: Memory, protocol: StreamProtocol, max_new_tokens: int) -> int:
    """Tokens the cache of a window is given: for its turns, what is said in them, and what is asked again."""
    assert memory.turns is not None
    said = OFTEN_SAID if memory.words else 0
    tokens = capacity_for(protocol, memory.turns, (), said) + max_new_tokens + MAX_STANDING
    return -(-tokens // 256) * 256


def question_room(memory: Memory, protocol: StreamProtocol, max_new_tokens: int, capacity: int) -> int:
    """Tokens of questions that can stand: they fit with one turn and a reply; other turns go early for them.

    Raises:
        ConfigError: the window itself does not fit into the capacity.
    """
    assert memory.turns is not None
    least = capacity_for(protocol, memory.turns, (), 0) + max_new_tokens
    if capacity < least:
        raise ConfigError(
            f"memory: expected a capacity of {least} tokens or more for a window of {memory.turns} turns, "
            f"found {capacity}: open the stream with a larger one, a smaller window, or no capacity at all"
        )
    return min(capacity - capacity_for(protocol, 1, (), 0) - max_new_tokens, MAX_STANDING)


# ------------------------------------------------------------------------------------------------ what is read again


@dataclasses.dataclass(frozen=True)
class KeptTurn:
    """A turn that may be read again.

    Attributes:
        turn: with its state and its own question; silent and without one where the policy keeps no words.
        reply: tokens of what was said.
        frame_tokens: [1, M, E], on the device, as they were when the frame was new.
    """

    turn: Turn
    reply: tuple[int, ...]
    frame_tokens: jax.Array


def keep(memory: Memory, turn: Turn, state: int, reply: Sequence[int], frame_tokens: jax.Array) -> KeptTurn:
    """What stays of a turn that is over."""
    if not memory.words:
        return KeptTurn(dataclasses.replace(turn, query=None, state=SILENCE), (), frame_tokens)
    return KeptTurn(dataclasses.replace(turn, state=state), tuple(reply), frame_tokens)


def standing(queries: Sequence[str], tokens_in: Callable[[str], int], room: int) -> list[str]:
    """The questions that are said again: all of them, each once, in the order of the last time they were asked.

    The references know one question a stream. They have at most `room` tokens: the oldest are forgotten.
    """
    newest, length = [], 0
    for query in reversed(queries):
        if query not in newest:
            length += tokens_in(query)
            if length > room:
                break
            newest.append(query)
    return newest[::-1]


def read_again(
    memory: Memory, protocol: StreamProtocol, past: Sequence[KeptTurn], turn: Turn, queries: Sequence[str], room: int
) -> tuple[list[KeptTurn], list[list[int]], Turn]:
    """A fresh prompt behind the protocol's prefix, of the newest turns.

    A question stands in the first turn and, as long as that is there, in its own (maifoundations/Streamo:
    `inference.py` with `global_question`, `scripts/benchmark/ovo_script.py`). SimpleStream asks behind all frames of
    one user turn, with nothing of what was said before; in the language of a protocol that is a question in the first
    turn alone, and silence at the frames before.

    Args:
        past: the turns before, oldest first.
        turn: the newest, undecided one.
        queries: that stand.
        room: tokens that fit; turns that said too much for it go early.

    Returns:
        The turns before that are left; the chunk of each turn, up to where its state is decided (what closes a turn
        opens the next chunk); and the newest turn as it reads there.
    """
    if not memory.words:
        turn = dataclasses.replace(turn, query=None)
    past = list(past[1:] if len(past) == memory.turns else past)
    while True:
        first, *others = [*(kept.turn for kept in past), turn]
        turns = [dataclasses.replace(first, query="\n".join(queries) or None), *others]
        chunks = [protocol.open_turn(turns[0])]
        for kept, before, after in zip(past, turns, turns[1:]):
            chunks.append([*protocol.end_turn(before, kept.reply), *protocol.open_turn(after)])
        if not past or sum(map(len, chunks)) <= room:
            return past, chunks, turns[-1]
        past = past[1:]
