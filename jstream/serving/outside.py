"""`Outside`: where the server goes of its own accord: hosts of sources and of webhooks, as the operator allowed them.

Names are looked up in a thread, as that may take long. Nothing is fetched here.
"""

import asyncio
import dataclasses
from collections.abc import Sequence

from jstream.serving.access import HostRules, NotAllowed, Target, check_url
from jstream.serving.limits import Refused
from jstream.serving.messages import Asked
from jstream.serving.streams import Query

SOURCES = ("rtsp", "rtsps", "http", "https")
WEBHOOKS = ("https", "http")
LOOKUP_SECONDS = 10.0  # for a name to be found


@dataclasses.dataclass(frozen=True)
class Outside:
    """What clients may name.

    Attributes:
        sources, webhooks: the hosts that are allowed.
    """

    sources: HostRules = dataclasses.field(default_factory=lambda: HostRules((), "--source_host"))
    webhooks: HostRules = dataclasses.field(default_factory=lambda: HostRules((), "--webhook_host"))

    async def source(self, url: str) -> Target:
        """A source that may be watched.

        Raises:
            Refused: 403.
        """
        return await _checked(url, SOURCES, self.sources, credentials=True)

    def opened(self, target: Target) -> str:
        """The url of a source as FFmpeg is given it, which looks a name up again: one that is allowed for its address
        alone may stand for another host by then, so that it gets the address that was checked."""
        return target.url if self.sources.names(target.host, target.port) else target.pinned

    async def queries(self, asked: Sequence[str | Asked], webhook: str | None) -> list[Query]:
        """Questions with their webhooks.

        Args:
            webhook: of those that have none of their own.

        Raises:
            Refused: 403 for a webhook that is not allowed.
        """
        queries = [
            Query(one, webhook) if isinstance(one, str) else Query(one.text, one.webhook or webhook) for one in asked
        ]
        for url in {query.webhook for query in queries if query.webhook is not None}:
            await _checked(url, WEBHOOKS, self.webhooks, credentials=False)
        return queries


async def _checked(url: str, schemes: Sequence[str], rules: HostRules, credentials: bool) -> Target:
    try:
        async with asyncio.timeout(LOOKUP_SECONDS):
            return await asyncio.to_thread(check_url, url, schemes, rules, credentials=credentials)
    except NotAllowed as error:
        raise Refused(403, str(error)) from None
    except TimeoutError:
        raise Refused(403, f"expected the host's address within {LOOKUP_SECONDS:g} s, found none; try again") from None
