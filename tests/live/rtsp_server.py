"""A camera of its own process: H.264 over RTSP, by GStreamer. Run by Debian's Python, which has the bindings.

Each picture is 16 upright bars, black or white: the milliseconds of the system's monotonic clock at which it was made,
modulo 2^16, highest bit first. Usage: `rtsp_server.py PORT WIDTH HEIGHT RATE [USER PASSWORD]`; it serves `/live`.
"""

import sys
import time

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

port, width, height, rate = sys.argv[1], *map(int, sys.argv[2:5])
Gst.init(None)

PIPELINE = (
    f"( appsrc name=bars is-live=true do-timestamp=true format=time "
    f"caps=video/x-raw,format=I420,width={width},height={height},framerate={rate}/1 "
    f"! x264enc tune=zerolatency speed-preset=ultrafast key-int-max={rate} ! rtph264pay name=pay0 pt=96 )"
)
BARS = {"0": b"\x10" * (width // 16), "1": b"\xeb" * (width // 16)}
COLOURLESS = b"\x80" * (width * height // 2)


def push(source, _size):
    """Makes the next picture when it is time for it."""
    period = 1 / rate
    time.sleep(period - time.monotonic() % period)
    row = b"".join(BARS[bit] for bit in f"{int(1000 * time.monotonic()) % 2**16:016b}")
    source.emit("push-buffer", Gst.Buffer.new_wrapped(row * height + COLOURLESS))


def configure(_factory, media):
    media.get_element().get_by_name_recurse_up("bars").connect("need-data", push)


server = GstRtspServer.RTSPServer(service=port, address="127.0.0.1")
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(PIPELINE)
factory.set_shared(True)
factory.connect("media-configure", configure)
if len(sys.argv) > 5:
    token = GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "watcher")
    permissions = GstRtspServer.RTSPPermissions()
    permissions.add_role("watcher")
    for what in ("media.factory.access", "media.factory.construct"):
        permissions.add_permission_for_role("watcher", what, True)
    factory.set_permissions(permissions)
    auth = GstRtspServer.RTSPAuth()
    auth.add_basic(GstRtspServer.RTSPAuth.make_basic(*sys.argv[5:7]), token)
    server.set_auth(auth)
server.get_mount_points().add_factory("/live", factory)
server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
