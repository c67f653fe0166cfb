"""The JoyAI protocol: Streamo's turns in the words of JoyAI-VL-Interaction, whose weights (Qwen3-VL, 8B) are open.

    system · { user: [question] <{i}.0 seconds> frame · assistant: </silence> | </response> reply }*

("JoyAI-VL-Interaction", arXiv 2606.14777; formats as in the repository jd-opensource/JoyAI-VL-Interaction: turns in
`datasets/convert_data.py`, the system prompt in `services/webinfer/live_adapter.py`.) There is no standby: it is
written as silence. A turn is labelled with the second at which it begins. Handing a task to a helper in the background
is no state: it stands in a reply, as plain text, which `split_delegation` takes apart.

Where the repository disagrees with itself, this is the form of its training data, one picture a turn: its server also
writes a header before a question and joins question, label and picture without line breaks, and its data hold two or
four pictures a turn where a video is short.
"""

import math
import re
from typing import ClassVar

from jstream.config import ProtocolConfig
from jstream.protocols.protocol import Turn
from jstream.protocols.streamo import Streamo

STATE_TOKENS = ("</silence>", "</response>")  # the only tokens that its vocabulary adds to Qwen3's

# The prompt that the published server gives the weights (`DEFAULT_SYSTEM_PROMPT_EN`); a format, verbatim. That of the
# training data is added outside the repository.
SYSTEM_PROMPT = """\
You are a real-time video streaming assistant observing a continuous camera feed frame by frame. \
The last frame represents the current moment.
## Action Format
At every inference step you MUST choose exactly one of the following three actions:
**Stay silent** — output ONLY:
</silence>
Choose this when nothing noteworthy has changed in the scene, no user query is pending, or there is nothing useful \
to say.
**Speak** — output the token followed by a concise reply:
</response> Your reply here.
Choose this when you observe something worth reporting or a significant state change, or when you can answer a user \
question based on available evidence.

**Delegate** — when a question is too hard or error-prone to answer reliably yourself, speak a brief note that you're \
delegating, then hand the question to the background solver:
</response> Brief note that you're delegating. </delegation> <the question>"""
PUBLISHED = ProtocolConfig(name="joyai", system=SYSTEM_PROMPT)  # over Qwen's chat template
MAX_PIXELS = 262_144  # a frame's budget in `services/webinfer/live_adapter.py`: 256 cells of Qwen3-VL


class JoyAI(Streamo):
    """The protocol over one tokenizer and one frame geometry."""

    name: ClassVar[str] = "joyai"
    own_tokens: ClassVar[tuple[str, ...]] = STATE_TOKENS
    state_tokens: ClassVar[tuple[str, ...]] = ("</silence>", "</silence>", "</response>")

    @staticmethod
    def label(turn: Turn) -> str:
        """The second at which a turn begins, as the model reads it: `<12.0 seconds>`, to the nearest tenth."""
        return f"<{math.floor(10 * turn.start + 0.5) / 10:.1f} seconds>"


_DELEGATION = re.compile("</?delegation>", re.IGNORECASE)  # the published server takes both


def split_delegation(reply: str) -> tuple[str, str | None]:
    """What a reply says, and the task that it hands over: "One moment. </delegation> Which moth is it?".

    Args:
        reply: the text of an event.

    Returns:
        The words to be said, and the task, None where there is none.
    """
    words, *tasks = _DELEGATION.split(reply, maxsplit=1)
    return words.strip(), "".join(tasks).strip() or None
