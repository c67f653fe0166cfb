"""Sources that the server watches by itself: cameras and streams of the network, each in a thread of its own.

    open_video → newest picture at every tick → hub → … → its answer → the next one

A frame is taken when the one before is answered, so that a slow model sees less and never sees late. Connections that
are lost are tried again by `data/live.py`, and what it tells of them becomes a notice. A recording is played at its own
pace.
"""

import logging
import threading
import time

from jstream.data.live import LiveVideo
from jstream.data.video import Paced, Video, VideoError, open_video, paced
from jstream.serving.hub import FAULT, Hub
from jstream.serving.streams import ServedStream

LOGGER = logging.getLogger(__name__)
ANSWER_SECONDS = 1.0  # after which a wait looks up whether the stream has ended


class Source:
    """The thread of one source; ends with its stream.

    Args:
        hub: that watches; the stream is open.
        stream: whose `on_answer` is taken.
        url: that is opened.
        reconnect: seconds for which a source that was lost is tried again.
    """

    def __init__(self, hub: Hub, stream: ServedStream, url: str, reconnect: float):
        self._hub, self._stream, self._url, self._reconnect = hub, stream, url, reconnect
        self._answered = threading.Event()
        self._video: Video | LiveVideo | None = None
        stream.on_answer = self._answered_one
        self._thread = threading.Thread(target=self._run, name=f"source {stream.id}", daemon=True)
        self._thread.start()

    def _answered_one(self) -> None:
        self._answered.set()
        video = self._video
        if self._stream.end is not None and isinstance(video, LiveVideo):
            video.stop()

    def _run(self) -> None:
        """The thread's whole life."""
        reason = "the source has ended"
        try:
            with open_video(self._url, fps=self._stream.fps, reconnect=self._reconnect) as video:
                self._video = video
                frames: LiveVideo | Paced = video if isinstance(video, LiveVideo) else paced(video)
                if isinstance(video, LiveVideo):
                    video.on_gap = self._stream.note_gap
                dropped = 0
                for frame in frames:
                    if self._stream.end is not None:
                        return
                    if frames.dropped > dropped:  # nobody had the time to look at them
                        self._hub.drop(self._stream, frame.time, frames.dropped - dropped)
                        dropped = frames.dropped
                    self._answered.clear()
                    self._stream.picture = frame
                    if self._hub.see(self._stream, frame, time.perf_counter()):
                        while self._stream.end is None and not self._answered.wait(ANSWER_SECONDS):
                            pass
        except VideoError as error:
            reason = str(error)
        except Exception:
            LOGGER.exception("a source has failed")
            reason = FAULT
        finally:
            self._hub.end(self._stream, reason)
