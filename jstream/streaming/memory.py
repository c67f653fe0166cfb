"""Memory: the policy that bounds the cache of a long stream. What is kept, and whether it is read again.

    append              everything, until the cache is full
    sinks[:120]         the newest turns and the first tokens of the stream, which stand right before them for whoever
                        looks back (StreamingLLM, arXiv 2309.17453); nothing is read again
    window[:120]        the newest turns alone, as they are: attention over a band
    hop[:300[:150]]     the newest turns; when there are too many, so many of the oldest go at once, what was asked is
                        said again in the first turn that is left, and the rest is read anew
    reprefill[:300]     the same with one turn at a time, as in Streamo's inference: all is read anew at every frame
    last_frames[:4]     the newest frames, as in SimpleStream: read anew at every frame, with no word of what was said

`sinks` and `window` cost one forward pass a silent frame for ever; a question whose turn goes is said again. Behind the
others stands a fresh prompt: positions start at 0, while the labels of turns and their frame tokens stay as they were.
`Places` keeps count of the slots of a cache under each policy; `stream.py` keeps the turns. Nothing here touches a
device.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jstream.config import ConfigError
from jstream.models.cache import CacheFullError, require_room
from jstream.protocols.protocol import RESPONSE, SILENCE, StreamProtocol, Turn

OFTEN_SAID = 16  # tokens of replies a turn to make room for; most turns are silent
MAX_STANDING = 2000  # tokens of questions that are said again
MIN_SINKS = 4  # tokens, where no system prompt opens the stream: as many as StreamingLLM found enough
REBASE_AT = 32_768  # rotary positions left out behind the sinks from which on a ring turns its keys back


@dataclasses.dataclass(frozen=True)
class Memory:
    """A policy.

    Attributes:
        turns: how many turns a decision sees, its own included; None for all.
        words: whether what was said and decided is kept with them.
        drops: how many turns go at once.
        ring: whether what is kept stays in the cache, and what goes makes place for what comes.
        sinks: whether the first tokens stay as well.
    """

    turns: int | None = None
    words: bool = True
    drops: int = 1
    ring: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        """As `parse_memory` reads it."""
        if self.turns is None:
            return "append"
        if self.ring:
            return f"{'sinks' if self.sinks else 'window'}:{self.turns}"
        if not self.words:
            return f"last_frames:{self.turns}"
        return f"reprefill:{self.turns}" if self.drops == 1 else f"hop:{self.turns}:{self.drops}"

    @property
    def reads_again(self) -> bool:
        return self.turns is not None and not self.ring

    def grows(self, num_turns: int) -> bool:
        """Whether a prompt of so many turns only grows by the next one."""
        return self.words and (self.turns is None or num_turns < self.turns)


# Turns by default: `max_rounds` of maifoundations/Streamo, `inference.py` (its OVO-Bench script keeps 121: it drops one
# when there are more than max_rounds + 1); `recent_frames_only` of EvolvingLMMs-Lab/SimpleStream.
WINDOWS = {
    "sinks": Memory(120, ring=True, sinks=True),
    "window": Memory(120, ring=True),
    "hop": Memory(300, drops=150),
    "reprefill": Memory(300),
    "last_frames": Memory(4, words=False),
}
EXPECTED = "append, sinks[:TURNS], window[:TURNS], hop[:TURNS[:DROPPED]], reprefill[:TURNS] or last_frames[:N]"


def parse_memory(text: str) -> Memory:
    """Reads one of EXPECTED.

    Raises:
        ConfigError: names what is expected.
    """
    found = re.fullmatch(r"(\w+)(?::([1-9]\d{0,5}))?(?::([1-9]\d{0,5}))?", text)
    if text == "append":
        return Memory()
    if found is None or found[1] not in WINDOWS or (found[3] and found[1] != "hop"):
        raise ConfigError(f"memory: expected {EXPECTED}, found {text!r}")
    policy = WINDOWS[found[1]]
    turns = int(found[2] or policy.turns or 0)
    drops = int(found[3]) if found[3] else max(turns // 2, 1) if found[1] == "hop" else 1
    if drops > turns:
        raise ConfigError(f"memory: expected at most {turns} turns to be dropped at once, found {drops} in {text!r}")
    return dataclasses.replace(policy, turns=turns, drops=drops)


def parse_narrower(text: str, memory: Memory) -> Memory:
    """Reads a policy that fits into the cache of another: the same over as many turns or fewer.

    Raises:
        ConfigError: for any other.
    """
    narrower = parse_memory(text)
    kind = lambda policy: (policy.turns is None, policy.words, policy.ring, policy.sinks)
    if kind(narrower) != kind(memory) or (narrower.turns or 0) > (memory.turns or 0):
        raise ConfigError(f"memory: expected {memory} or fewer turns of it, as the cache was made for, found {text!r}")
    return narrower


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
    closing = len(protocol.close_turn(RESPONSE))
    return len(protocol.prefix) + num_turns * turn + asked + closing


def window_capacity(memory: Memory, protocol: StreamProtocol, max_new_tokens: int) -> int:
    """Tokens the cache of a window is given: for its turns, what is said in them, and what is asked again.

    A ring has place for a turn more, as what goes and what comes never share a slot.
    """
    assert memory.turns is not None
    said = OFTEN_SAID if memory.words else 0
    tokens = capacity_for(protocol, memory.turns + memory.ring, (), said) + max_new_tokens + MAX_STANDING
    return -(-tokens // 256) * 256


def question_room(memory: Memory, protocol: StreamProtocol, max_new_tokens: int, capacity: int, beside: int = 0) -> int:
    """Tokens of questions that can stand: they fit with one turn and a reply; other turns go early for them.

    Args:
        beside: tokens that are taken otherwise.

    Raises:
        ConfigError: the window itself does not fit into the capacity.
    """
    assert memory.turns is not None
    for_one = capacity_for(protocol, 1, (), 0) + max_new_tokens + beside
    least = max(capacity_for(protocol, memory.turns, (), 0) + max_new_tokens, for_one)
    if capacity < least:
        raise ConfigError(
            f"memory: expected a capacity of {least} tokens or more for a window of {memory.turns} turns, "
            f"found {capacity}: open the stream with a larger one, a smaller window, or no capacity at all"
        )
    return min(capacity - for_one, MAX_STANDING)


# --------------------------------------------------------------------------------------------- the slots of a cache


@dataclasses.dataclass(frozen=True)
class _Held:
    """What a turn holds of a ring: its first token, and the stretches [begin, end) of slots that it lies in."""

    position: int
    rope: int
    stretches: tuple[tuple[int, int], ...] = ()
    queries: tuple[str, ...] = ()

    def overlaps(self, begin: int, end: int) -> bool:
        return any(a < end and begin < b for a, b in self.stretches)


class Mark(NamedTuple):
    """Where a stream stood: what `Places.go_back` goes back to."""

    position: int
    rope: int
    next: int
    oldest: int
    gap: int
    turns: tuple[_Held, ...]


class Places:
    """Where the tokens of one stream lie in its cache, as the host counts them.

    Args:
        capacity: slots that tokens may take. The cache has `spare` more behind them.
        spare: slots that a step may write beside those of its tokens, as it is padded.
        memory: its policy.
        sinks: tokens at the start that a ring with sinks never gives up.

    Attributes:
        position: index in the stream of the next token.
        rope: its rotary position.
        oldest: positions before it are forgotten, but for the sinks.
        gap: rotary positions that are left out behind the sinks.
    """

    def __init__(self, capacity: int, spare: int, memory: Memory, sinks: int):
        self.capacity, self.spare, self.memory, self.sinks = capacity, spare, memory, sinks
        self.forget()

    def forget(self, keep: int = 0) -> None:
        """Forgets all but the first tokens; `keep` are text, each of one rotary position."""
        self.position = self.rope = self._next = keep
        self.oldest = self.gap = 0
        self._turns: collections.deque[_Held] = collections.deque()

    @property
    def left(self) -> int:
        """Slots that are left; in a ring, for the turn that is under way."""
        if not self.memory.ring:
            return self.capacity - self._next
        own = sum(end - begin for begin, end in self._turns[-1].stretches) if self._turns else 0
        return self.capacity - self.sinks - 2 * self.spare - own

    @property
    def used(self) -> int:
        """Tokens that whatever comes next would see."""
        return self.position - self.oldest + (self.sinks if self.oldest else 0)

    def open_turn(self) -> list[str]:
        """Begins a turn; in a ring the oldest one goes where there are as many as may be kept.

        Returns:
            What was asked in turns that went.
        """
        if not self.memory.ring:
            return []
        gone = []
        while len(self._turns) >= (self.memory.turns or 0):
            gone += self._drop()
        self._turns.append(_Held(self.position, self.rope))
        self._look_back()
        return gone

    def ask(self, queries: Sequence[str]) -> None:
        """Notes what is asked in the turn that is under way, to hear of it when it goes."""
        if self.memory.ring:
            self._turns[-1] = dataclasses.replace(self._turns[-1], queries=tuple(queries))

    def take(self, count: int) -> tuple[int, list[str]]:
        """Slots for the next `count` tokens.

        Returns:
            The first of them, and what was asked in turns that had to go for them.

        Raises:
            CacheFullError: there are none; nothing has changed.
        """
        if not self.memory.ring:
            require_room(self._next, count, self.capacity)
            start, gone = self._next, []
        else:
            start, gone = self._take_of_ring(count)
        self._next = start + count
        self.position += count
        return start, gone

    def mark(self) -> Mark:
        """Where the stream stands."""
        return Mark(self.position, self.rope, self._next, self.oldest, self.gap, tuple(self._turns))

    def go_back(self, mark: Mark) -> None:
        """Takes back what came behind a mark. The cache has it all still if `harms` said so of every token since."""
        self.position, self.rope, self._next, self.oldest, self.gap, turns = mark
        self._turns = collections.deque(turns)

    def harms(self, count: int, mark: Mark | None = None) -> bool:
        """Whether the next `count` tokens would take the place of something, or find none: of what is held now, and at
        a mark."""
        if count > self.left:
            return True
        start = self._start(count)
        held = self._turns if mark is None else (*mark.turns, *self._turns)
        return any(turn.overlaps(start, start + self.spare) for turn in held)

    def rebase(self) -> int:
        """Rotary positions that the keys behind the sinks can go back by; counts them as gone back."""
        distance = self.gap
        self._turns = collections.deque(dataclasses.replace(turn, rope=turn.rope - distance) for turn in self._turns)
        self.rope -= distance
        self.gap = 0
        return distance

    def _start(self, count: int) -> int:
        """The slot of the first of the next `count` tokens."""
        return self.sinks if self.memory.ring and self._next + count > self.capacity else self._next

    def _take_of_ring(self, count: int) -> tuple[int, list[str]]:
        if count > self.left:
            raise CacheFullError(
                f"the cache holds {self.capacity} tokens: a turn that takes {count} more does not fit; open the stream "
                "with a larger capacity"
            )
        start = self._start(count)
        gone: list[str] = []
        while any(turn.overlaps(start, start + self.spare) for turn in list(self._turns)[:-1]):  # padding included
            gone += self._drop()
        self._look_back()
        own = self._turns[-1].stretches
        if own and own[-1][1] == start:
            own = (*own[:-1], (own[-1][0], start + count))
        else:
            own = (*own, (start, start + count))
        self._turns[-1] = dataclasses.replace(self._turns[-1], stretches=own)
        return start, gone

    def _drop(self) -> list[str]:
        return list(self._turns.popleft().queries)

    def _look_back(self) -> None:
        """Sets what the next tokens see: from the oldest turn that is left on."""
        oldest = self._turns[0]
        if oldest.position > self.sinks:
            self.oldest = oldest.position
            self.gap = oldest.rope - self.sinks


# ------------------------------------------------------------------------------------------------ what is read again


@dataclasses.dataclass(frozen=True)
class KeptTurn:
    """A turn that may be read again.

    Attributes:
        turn: with its state and its own question; silent and without one where the policy keeps no words.
        reply: tokens of what was said.
        frame: which of the frames that the batch keeps it is.
    """

    turn: Turn
    reply: tuple[int, ...]
    frame: int


def keep(memory: Memory, turn: Turn, state: int, reply: Sequence[int], frame: int) -> KeptTurn:
    """What stays of a turn that is over."""
    if not memory.words:
        return KeptTurn(dataclasses.replace(turn, query=None, state=SILENCE), (), frame)
    return KeptTurn(dataclasses.replace(turn, state=state), tuple(reply), frame)


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
    past = list(past[memory.drops :] if len(past) == memory.turns else past)
    while True:
        first, *others = [*(kept.turn for kept in past), turn]
        turns = [dataclasses.replace(first, query="\n".join(queries) or None), *others]
        chunks = [protocol.open_turn(turns[0])]
        for kept, before, after in zip(past, turns, turns[1:]):
            chunks.append([*protocol.end_turn(before, kept.reply), *protocol.open_turn(after)])
        if not past or sum(map(len, chunks)) <= room:
            return past, chunks, turns[-1]
        past = past[1:]
