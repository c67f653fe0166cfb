"""Claims about `jstream.serving.access`: which urls a server follows, and which requests it hears."""

import pytest

from jstream.errors import UserError
from jstream.serving import access
from jstream.serving.access import HostRules, NotAllowed, check_url
from jstream.serving.outside import SOURCES, Outside

WEB = ("https", "http")
CAMERAS = ("rtsp", "rtsps", "http", "https")


def names(**known):
    """A resolver that knows these names, written with _ for a dot."""
    table = {name.replace("_", "."): addresses for name, addresses in known.items()}
    return lambda host, port: table.get(host, [])


def unasked(host, port):
    raise AssertionError(f"{host} was looked up")


def refusal(url, *patterns, resolve=unasked, schemes=WEB, **arguments) -> str:
    """Why a url is refused, which is one line that holds nothing secret."""
    with pytest.raises(NotAllowed) as raised:
        check_url(url, schemes, HostRules(patterns, "--webhook_host"), resolve, **arguments)
    message = str(raised.value)
    assert message.isprintable() and len(message) < 400 and "secret" not in message
    return message


def addresses(url, *patterns, resolve=unasked, schemes=WEB):
    return check_url(url, schemes, HostRules(patterns), resolve).addresses


# ------------------------------------------------------------------------------------------------------------ the rules


def test_without_rules_nothing_is_allowed_and_nobody_is_asked_for_an_address():
    assert not HostRules([])
    message = refusal("https://example.com/hook")
    assert "--webhook_host=example.com" in message


def test_a_name_that_the_operator_wrote_may_stand_for_a_private_address():
    known = names(camera_lan=["192.168.1.20", "fd00::20"])
    assert addresses("http://Camera.LAN./x", "camera.lan", resolve=known) == ("192.168.1.20", "fd00::20")
    assert addresses("http://camera.lan/x", "CAMERA.lan.", resolve=known) == ("192.168.1.20", "fd00::20")


def test_a_name_is_no_pattern_for_others():
    for url in ("https://evil-example.com", "https://example.com.evil.org", "https://a.example.com"):
        refusal(url, "example.com")


def test_names_below_a_name_are_allowed_and_the_name_itself_is_not():
    known = names(a_example_com=["93.184.216.34"], b_a_example_com=["93.184.216.34"])
    assert addresses("https://a.example.com", "*.example.com", resolve=known)
    assert addresses("https://b.a.example.com", "*.example.com", resolve=known)
    refusal("https://example.com", "*.example.com")
    refusal("https://aexample.com", "*.example.com")


@pytest.mark.parametrize("pattern", ["public", "*.example.com"])
@pytest.mark.parametrize(
    "private",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.0.192",
        "168.63.129.16",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fd00::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8%1",
        "::7f00:1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    ],
)
def test_one_private_address_among_public_ones_is_enough_to_refuse(pattern, private):
    known = names(a_example_com=["93.184.216.34", private])
    if private == "::ffff:8.8.8.8%1":
        assert addresses("https://a.example.com", pattern, resolve=known) == ("93.184.216.34", "8.8.8.8")
        return
    message = refusal("https://a.example.com", pattern, resolve=known)
    assert "public address" in message and "--webhook_host=a.example.com" in message
    assert private not in message  # what a name stands for inside is nobody's business


def test_public_hosts_are_allowed_by_name_and_by_address():
    known = names(example_com=["93.184.216.34", "2606:2800:220:1::1"])
    assert addresses("https://example.com", "public", resolve=known) == ("93.184.216.34", "2606:2800:220:1::1")
    assert addresses("https://93.184.216.34", "public") == ("93.184.216.34",)
    assert addresses("https://[2606:2800:220:1::1]:8443/", "public") == ("2606:2800:220:1::1",)
    assert addresses("https://[64:ff9b::808:808]/", "public") == ("64:ff9b::808:808",)  # 8.8.8.8, from IPv6 alone
    refusal("https://127.0.0.1", "public")
    refusal("https://[::1]", "public")


def test_a_private_address_is_allowed_by_its_network_however_it_is_named():
    known = names(camera_lan=["10.0.0.9"], both_lan=["10.0.0.9", "10.1.0.9"], a_example_com=["10.0.0.9"])
    assert addresses("http://10.0.0.9/", "10.0.0.0/24") == ("10.0.0.9",)
    assert addresses("http://camera.lan/", "10.0.0.0/24", resolve=known) == ("10.0.0.9",)
    assert addresses("http://a.example.com/", "*.example.com", "10.0.0.0/24", resolve=known) == ("10.0.0.9",)
    refusal("http://both.lan/", "10.0.0.0/24", resolve=known)
    refusal("http://10.0.1.9/", "10.0.0.0/24")
    assert addresses("http://[fd00::5]/", "fd00::/8") == addresses("http://[fd00::5]/", "[fd00::5]") == ("fd00::5",)


def test_an_ipv4_address_in_ipv6_is_that_ipv4_address():
    assert addresses("http://[::ffff:10.0.0.9]/", "10.0.0.9") == ("10.0.0.9",)
    assert addresses("http://[::ffff:a00:9]/", "10.0.0.9") == ("10.0.0.9",)
    refusal("http://[::ffff:127.0.0.1]/", "public")
    refusal("http://[::ffff:127.0.0.1]/", "::/0")


@pytest.mark.parametrize("pattern", ["example.com", "*.example.com", "public", "93.184.216.34", "93.184.216.0/24"])
def test_a_pattern_with_a_port_allows_that_port_alone(pattern):
    known = names(a_example_com=["93.184.216.34"], example_com=["93.184.216.34"])
    host = pattern if pattern in ("example.com", "93.184.216.34") else "a.example.com"
    assert addresses(f"https://{host}/", f"{pattern}:443", resolve=known)
    assert addresses(f"http://{host}:443/", f"{pattern}:443", resolve=known)
    refusal(f"http://{host}/", f"{pattern}:443", resolve=known)
    assert addresses(f"http://{host}/", pattern, resolve=known)


def test_ipv6_patterns_with_a_port_stand_in_brackets():
    assert addresses("http://[::1]:8080/", "[::1]:8080") == ("::1",)
    assert addresses("http://[fd00::5]:8080/", "[fd00::/8]:8080") == ("fd00::5",)
    refusal("http://[::1]:8081/", "[::1]:8080")


@pytest.mark.parametrize(
    "pattern",
    ["", "*", "*.", "a b", "https://example.com", "example.com/x", "10.0.0.1/8", "10.0.0.0/33", "127.1", "0x7f.0.0.1"]
    + ["example.com:0", "example.com:65536", "example.com:x", "[::1", "[example.com]", "::1%lo", "a..b", "*.127.0.0.1"]
    + ["user@example.com", "-a.com", "a" * 64 + ".com"],
)
def test_a_pattern_that_could_never_match_is_an_error(pattern):
    with pytest.raises(UserError, match="--source_host: expected a name"):
        HostRules([pattern])


def test_a_name_without_an_address_is_told_as_such():
    assert "with an address, found none" in refusal("https://gone.example.com", "public", resolve=names())


# ------------------------------------------------------------------------------------------------------------- the urls


def test_a_url_is_taken_apart():
    target = check_url(
        "RTSP://admin:secret@Camera.LAN:8554/live?channel=1&password=secret",
        CAMERAS,
        HostRules(["camera.lan"]),
        names(camera_lan=["192.168.1.20"]),
    )
    assert (target.scheme, target.host, target.port) == ("rtsp", "camera.lan", 8554)
    assert target.path == "/live?channel=1&password=secret"
    assert target.shown == "rtsp://…@camera.lan:8554/live?…"
    assert "secret" not in repr(target)
    assert target.url == "rtsp://admin:secret@camera.lan:8554/live?channel=1&password=secret"
    assert target.pinned == "rtsp://admin:secret@192.168.1.20:8554/live?channel=1&password=secret"


def test_usual_ports_and_paths_need_not_be_given():
    known = names(a_lan=["10.0.0.1"])
    take = lambda url: check_url(url, CAMERAS, HostRules(["a.lan"]), known)
    assert [(take(f"{s}://a.lan").port, take(f"{s}://a.lan").path) for s in CAMERAS] == [
        (554, ""),
        (322, ""),
        (80, "/"),
        (443, "/"),
    ]
    assert take("http://a.lan?x=1").path == "/?x=1"
    assert take("http://a.lan/a@b:c//[d]").path == "/a@b:c//[d]"


def test_names_of_all_scripts_are_what_the_dns_calls_them():
    known = lambda host, port: ["93.184.216.34"] if host == "xn--bcher-kva.example" else []
    target = check_url("https://Bücher.example/", WEB, HostRules(["bücher.example"]), known)
    assert target.host == "xn--bcher-kva.example"
    assert target.url == "https://xn--bcher-kva.example/"


@pytest.mark.parametrize(
    "host",
    ["127.1", "2130706433", "0x7f.0.0.1", "0x7f000001", "0177.0.0.1", "127.0.0.01", "127.0.0.1.1", "256.0.0.1", "1"]
    + ["0x", "a.0x7f", "a.1", "127。1", "１２７.1", "[127.0.0.1]", "[::1%25lo]", "[::1%lo]", "[fe80::1%eth0]", "[::g]"]
    + ["", ".", "..", "a..b", ".a", "%31%32%37.0.0.1", "a%00b", "a_b!", "[", "]", "[]", "[::1", "::1", "a,b", "-a"]
    + ["a" * 64, "a." * 130 + "a", "a:b", "a:", "a:+1", "a:-1", "a:1_0", "a:１"],
)
def test_hosts_that_readers_of_urls_take_for_different_ones_are_refused(host):
    assert "expected" in refusal(f"http://{host}/", "public", "0.0.0.0/0", "::/0")


def test_other_digits_for_an_address_are_that_address():
    assert addresses("http://１０.0.0.1/", "10.0.0.1") == ("10.0.0.1",)
    refusal("http://１２７.0.0.1/", "public")


@pytest.mark.parametrize(
    "url",
    [
        "http://a.lan\\@b.lan/",
        "http:\\\\a.lan/",
        "http://a.lan/ x",
        " http://a.lan/",
        "http://a.lan/\r\nHost: b",
        "\thttp://a",
    ]
    + ["http://a.lan/\x00", "http://a.lan/\x7f", "http://a.lan/\x85", "http://a.lan/\xa0", "http://a.lan#@b.lan/"]
    + ["http://a.lan/#x", "http://b@c@a.lan/", "http://a.lan/ü", "http://a.lan/\u2028", "http://a.lan:0/"]
    + ["http://a.lan:65536/", "http://a.lan:99999/", "http:a.lan", "http:/a.lan", "//a.lan", "a.lan", "", "://a.lan"]
    + [
        "file:///etc/passwd",
        "ftp://a.lan/",
        "javascript:alert(1)",
        "gopher://a.lan",
        "https+x://a.lan",
        "0",
        "/dev/video0",
    ]
    + ["http://a.lan@b.lan/", "http://a.lan:80@b.lan/", "http://" + "a" * 2050],
)
def test_urls_that_are_malformed_or_lead_elsewhere_are_refused(url):
    assert "expected" in refusal(url, "a.lan", resolve=names(a_lan=["10.0.0.1"]))


def test_the_length_of_a_url_is_bounded():
    longest = "http://a.lan/" + "x" * (access.MAX_URL - len("http://a.lan/"))
    assert addresses(longest, "a.lan", resolve=names(a_lan=["10.0.0.1"]))
    assert "2,048 characters, found 2,049" in refusal(longest + "x", "a.lan")


def test_a_user_and_a_password_may_be_refused_and_are_never_shown():
    message = refusal("http://user:secret@a.lan/", "a.lan", credentials=False)
    assert "without user and password" in message
    refusal("http://user:secret@b.lan/?secret", "a.lan")


def test_a_scheme_without_a_usual_port_needs_one():
    known = names(a_lan=["10.0.0.1"])
    assert check_url("srt://a.lan:9000", ("srt",), HostRules(["a.lan"]), known).port == 9000
    assert "found none" in refusal("srt://a.lan", "a.lan", schemes=("srt",))


def test_the_systems_resolver_gives_addresses_and_nothing_for_what_is_no_name():
    assert access.resolve("127.0.0.1", 80) == ["127.0.0.1"]
    assert access.resolve("a..b", 80) == access.resolve("x" * 70, 80) == []


# ------------------------------------------------------------------------------------------------------ who may come in


def test_tokens_are_long_different_and_fit_into_a_subprotocol():
    tokens = {access.make_token() for _ in range(20)}
    assert len(tokens) == 20
    assert all(len(token) == 43 and access.checked_token(f"{token}\n") == token for token in tokens)


@pytest.mark.parametrize("text", ["", "short", "with a space in it", "has/slashes/in/base64==", "ünïcödé-is-not-sent"])
def test_a_token_that_a_browser_could_not_send_is_an_error(text):
    with pytest.raises(UserError, match="JSTREAM_TOKEN: expected a token") as raised:
        access.checked_token(text)
    assert len(text) < 6 or text not in str(raised.value)


def test_only_the_right_token_matches():
    assert access.token_matches("abcdefgh", "abcdefgh")
    for wrong in (None, "", "abcdefg", "abcdefghi", "ABCDEFGH", "äbcdefgh", "\ud800"):
        assert not access.token_matches(wrong, "abcdefgh")
    assert not access.token_matches("", "") and not access.token_matches(None, "")


def test_a_token_comes_by_its_header_or_as_a_subprotocol():
    assert access.bearer_of("Bearer abc") == access.bearer_of("bearer  abc ") == "abc"
    assert access.bearer_of(None, ["jstream.v1", "bearer.a.b"]) == "a.b"
    assert access.bearer_of("Basic dXNlcg==", ["bearer.abc"]) == "abc"
    assert access.bearer_of("Bearer abc", ["bearer.other"]) == "abc"
    for header in (None, "", "abc", "Bearer", "Bearer ", "Basic abc"):
        assert access.bearer_of(header, ["jstream.v1"]) is None


def test_a_page_may_talk_to_its_own_server_and_others_only_if_listed():
    allowed = ["https://app.example.com", "http://localhost:3000/"]
    may = lambda origin, host="box:8000", scheme="http": access.origin_allowed(origin, host, scheme, allowed)
    assert may(None)
    assert may("http://box:8000") and may("http://BOX:8000") and may("http://box:8000", scheme="ws")
    assert may("https://box", "box", "https") and may("https://box", "box:443", "wss") and may("http://box:80", "box")
    assert may("https://app.example.com") and may("https://app.example.com:443") and may("http://localhost:3000")
    for foreign in [
        "http://box",
        "http://box:8001",
        "https://box:8000",
        "http://box.evil.org:8000",
        "null",
        "",
        "box:8000",
    ]:
        assert not may(foreign)
    for foreign in [
        "https://app.example.com.evil.org",
        "http://app.example.com",
        "https://evil.org",
        "http://user@box:8000",
    ]:
        assert not may(foreign)
    assert not access.origin_allowed("http://", "", "http") and not access.origin_allowed("null", None, "http")


def test_an_origin_that_no_page_could_have_is_an_error():
    assert access.checked_origins(["https://app.example.com/"]) == ("https://app.example.com",)
    for wrong in ("*", "app.example.com", "https://app.example.com/page", "null"):
        with pytest.raises(UserError, match="--origin: expected an origin"):
            access.checked_origins([wrong])


@pytest.mark.parametrize("bound", ["127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.2"])
def test_on_loopback_only_its_own_names_are_heard(bound):
    heard = lambda host: access.host_allowed(host, bound, ["cam.example.com", "https://app.example.com:444"], "box")
    assert all(map(heard, ["localhost", "localhost:8000", "LOCALHOST.:1", "127.0.0.1:8000", "[::1]:8000", "[0:0::1]"]))
    assert heard("cam.example.com") and heard("cam.example.com:8000") and heard("app.example.com:444")
    foreign = [
        "app.example.com",
        "evil.org",
        "evil.org:8000",
        "localhost.evil.org",
        "10.0.0.1",
        "box",
        "127.1",
        "",
        None,
    ]
    assert not any(map(heard, [*foreign, "a@localhost", "localhost:x", "[::1", "localhost/", "2130706433"]))


def test_elsewhere_addresses_and_the_machines_names_are_heard_too():
    heard = lambda host: access.host_allowed(host, "0.0.0.0", ["cam.example.com"], "Box.lan")
    own = ["10.0.0.1:8000", "[fd00::1]:8000", "localhost:8000", "box", "box.lan", "box.local:8000", "cam.example.com"]
    assert all(map(heard, own))
    assert not any(map(heard, ["evil.org", "box.evil.org", "127.1", "0x7f.1", "", None, "*"]))
    assert access.host_allowed("cam.lan:8000", "cam.lan", machine="box")


def test_a_source_that_is_allowed_for_its_address_is_opened_by_that_address():
    """Or the name could stand for another one by the time that FFmpeg looks it up."""
    outside = Outside(sources=HostRules(["10.0.0.0/8", "camera.example"], "--source_host"))
    look_up = lambda name, port: ["10.1.2.3"]
    opened = lambda url: outside.opened(check_url(url, SOURCES, outside.sources, look_up))
    assert opened("rtsp://me:word@door.example/live?a=1") == "rtsp://me:word@10.1.2.3:554/live?a=1"
    assert opened("rtsp://camera.example/live") == "rtsp://camera.example/live"
