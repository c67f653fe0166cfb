"""Who may come in, and where the server may go out: tokens, origins and Host headers; urls that a client names.

`HostRules` are what the operator allowed by flags, nothing by default; `check_url` holds a client's url against them
and gives the addresses to connect to. Nothing here opens a connection or keeps state, and only `resolve` asks the
network: it may take long, so whoever must not wait calls `check_url` in a thread.
"""

import dataclasses
import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Sequence

from jstream.errors import UserError

MAX_URL = 2048  # characters; proxies and servers commonly cut off not far above
MAX_HOST, MAX_LABEL = 253, 63  # characters of a name in the DNS (RFC 1035)
PORTS = {"http": 80, "https": 443, "rtsp": 554, "rtsps": 322}  # IANA
MIN_TOKEN = 16  # characters that an operator's own token has at least
LOOPBACK = ("localhost", "127.0.0.1", "::1")
INTERNAL = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # IETF's protocols (RFC 6890), and one cloud's metadata; global to some versions of Python
            "168.63.129.16/32",  # looks public, and is Azure's host to each of its machines
        ),
    )
)
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052; the last 32 bits are an IPv4 address

_LABEL = re.compile(r"(?!-)[a-z0-9_-]+(?<!-)")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?]*)(/[^?]*)?(\?.*)?")
_PLACE = re.compile(
    r"(?:\[([0-9a-fA-F]*:[0-9a-fA-F:.]+)\]|([^\[\]:@/]+))(?::([0-9]{1,5}))?"
)  # host or [v6], and a port
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110; nothing else fits into a subprotocol

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Sequence[str]]


class NotAllowed(UserError):
    """A url that is malformed, or that leads where the operator did not allow it."""


# ------------------------------------------------------------------------------------------------------ where to go out


@dataclasses.dataclass(frozen=True)
class Target:
    """A url that was checked.

    Attributes:
        scheme, host, port: the host in lower case and ASCII, without brackets.
        path: with its query, as it was given; at least `/` for http and https.
        addresses: what the host stood for when it was checked. Whoever looks the name up again may find another one.
        shown: the url for messages, without user, password and query.
        url: the whole of it.
    """

    scheme: str
    host: str
    port: int
    path: str = dataclasses.field(repr=False)
    addresses: tuple[str, ...]
    shown: str
    url: str = dataclasses.field(repr=False)
    _credentials: str = dataclasses.field(default="", repr=False)

    @property
    def pinned(self) -> str:
        """The url with the first address in place of the name, for clients that would look it up again; not for TLS,
        whose certificates are of names."""
        return f"{self.scheme}://{self._credentials}{_bracketed(self.addresses[0])}:{self.port}{self.path}"


class HostRules:
    """The hosts that a flag allows. False where there are none.

    Args:
        patterns: names, `*.name` (all below it), addresses, networks (`10.0.0.0/8`), or `public`, which is every host
            all of whose addresses are reachable from everywhere. Each with or without `:port`; IPv6 then in brackets.
        flag: where they come from, for messages.

    Raises:
        UserError: a pattern is none of these.
    """

    def __init__(self, patterns: Iterable[str] = (), flag: str = "--source_host"):
        self.flag = flag
        self._names: set[tuple[str, int | None]] = set()
        self._parents: set[tuple[str, int | None]] = set()
        self._public: set[int | None] = set()
        self._networks: list[tuple[Network, int | None]] = []
        for pattern in patterns:
            self._add(pattern.strip())

    def _add(self, pattern: str) -> None:
        text, port = pattern, None
        if bracketed := re.fullmatch(r"\[(.+)\](?::([0-9]{1,5}))?", pattern):
            text, port = bracketed.groups()
        elif pattern.count(":") == 1:
            text, port = pattern.split(":")
        known_port = port is None or (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536)
        number = int(port) if port and known_port else None
        name = _ascii(text.removeprefix("*."))
        if known_port and text.lower() == "public":
            self._public.add(number)
        elif known_port and (network := _network(text)):
            self._networks.append((network, number))
        elif known_port and name and not bracketed and not _address(name):
            (self._parents if text.startswith("*.") else self._names).add((name, number))
        else:
            raise UserError(
                f"{self.flag}: expected a name, *.name, an address, a network such as 10.0.0.0/8 or the word public, "
                f"each with or without :port, found {pattern!r}"
            )

    def __bool__(self) -> bool:
        return bool(self._names or self._parents or self._public or self._networks)

    def names(self, host: str, port: int) -> bool:
        """Whether exactly this name is allowed: then it may stand for any address."""
        return bool({(host, port), (host, None)} & self._names)

    def opens(self, host: str, port: int) -> bool:
        """Whether this host is one of many that are allowed, as long as they stand for public addresses."""
        below = any(host.endswith(f".{parent}") and only in (None, port) for parent, only in self._parents)
        return below or bool({port, None} & self._public)

    def holds(self, address: Address, port: int) -> bool:
        """Whether the address itself is allowed."""
        return any(address in network and only in (None, port) for network, only in self._networks)

    @property
    def by_address(self) -> bool:
        """Whether a name may be allowed for its address."""
        return bool(self._networks)


def resolve(host: str, port: int) -> Sequence[str]:
    """Addresses of a name, none where it has none. May take as long as the system's resolver does."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


def check_url(
    url: str, schemes: Sequence[str], rules: HostRules, resolve: Resolve = resolve, credentials: bool = True
) -> Target:
    """Takes a url apart and holds it against the rules; a name is looked up, and every address of it has to pass.

    A name that the rules hold exactly may stand for any address: the operator meant that host. One that is allowed as
    `*.name` or `public` may stand for public addresses, and for those that are allowed themselves.

    Args:
        url: as a client gave it.
        schemes: those allowed; one without a usual port needs its port in the url.
        resolve: (name, port) → addresses.
        credentials: whether it may hold a user and a password.

    Raises:
        NotAllowed: one sentence, without what may be secret in the url.
    """
    scheme, user, host, port, given_port, path = _apart(url, schemes, credentials)
    allow = f"start the server with {rules.flag}={_bracketed(host)} if it is meant to be reached"
    refusal = NotAllowed(f"{host}: expected a host that {rules.flag} allows, found one that it does not; {allow}")
    literal = _address(host)
    by_name, one_of_many = rules.names(host, port), rules.opens(host, port)
    if not (literal or by_name or one_of_many or rules.by_address):
        raise refusal  # before anybody is asked for its address
    found = [literal] if literal else [_plain(ipaddress.ip_address(a)) for a in resolve(host, port)]
    if not found:
        raise NotAllowed(f"{host}: expected a host with an address, found none; check the name")
    for address in found:
        if by_name or rules.holds(address, port):
            continue
        if not one_of_many:
            raise refusal
        if not is_public(address):
            raise NotAllowed(f"{host}: expected a public address, found one that is not; {allow}")
    place = _bracketed(host) + (f":{port}" if given_port else "")
    return Target(
        scheme=scheme,
        host=host,
        port=port,
        path=path,
        addresses=tuple(dict.fromkeys(map(str, found))),
        shown=f"{scheme}://{user and '…@'}{place}{path.partition('?')[0]}{'?…' if '?' in path else ''}",
        url=f"{scheme}://{user}{place}{path}",
        _credentials=user,
    )


def _apart(url: str, schemes: Sequence[str], credentials: bool) -> tuple[str, str, str, int, bool, str]:
    """(scheme, `user:password@` or nothing, host, port, whether it was given, path with query)"""
    kinds = " or ".join(schemes)
    if len(url) > MAX_URL:
        raise NotAllowed(f"expected a url of at most {MAX_URL:,} characters, found {len(url):,}; shorten it")
    if re.search(r"[\x00-\x20\x7f-\xa0\\#]", url):  # readers of urls differ on what these mean
        raise NotAllowed("expected a url without spaces, control characters, \\ and #, found one; write it as %XX")
    parts = _URL.fullmatch(url)
    if parts is None or parts[1].lower() not in schemes:
        found = "no scheme" if parts is None else parts[1][:20]
        raise NotAllowed(f"expected a url with the scheme {kinds}, found {found}; write it as {schemes[0]}://HOST/PATH")
    scheme, authority, path = parts[1].lower(), parts[2], (parts[3] or "") + (parts[4] or "")
    user, at, rest = authority.rpartition("@")
    if "@" in user:
        raise NotAllowed("expected one @ before the host of a url, found more; write that of a password as %40")
    if at and not credentials:
        raise NotAllowed("expected a url without user and password, found one with them; leave them out")
    if not (path + user).isascii():
        raise NotAllowed("expected a url in ASCII but for its host, found other characters; write them as %XX")
    place = _PLACE.fullmatch(rest)
    host = (str(_address(place[1]) or "") if place[1] else _ascii(place[2])) if place else ""
    if place is None or not host:
        raise NotAllowed(
            "expected a url with a name, or an address in its usual form, as its host, found another host; write it as "
            f"{schemes[0]}://HOST/PATH"
        )
    port = int(place[3]) if place[3] else PORTS.get(scheme, 0)
    if not 0 < port < 65536:
        raise NotAllowed(f"{host}: expected a port from 1 to 65535, found {place[3] or 'none'}; write it as HOST:PORT")
    if scheme in ("http", "https") and not path.startswith("/"):
        path = "/" + path
    return scheme, user + at, host, port, bool(place[3]), path


def is_public(address: Address) -> bool:
    """Whether an address is one host that can be reached from everywhere. IPv4 written as IPv6 is judged as the IPv4
    address; tunnels (6to4, Teredo), which lead to a host behind them, are not public."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.ipv4_mapped:
            return is_public(address.ipv4_mapped)
        if address.sixtofour or address.teredo or address.is_site_local:
            return False
    internal = address.is_multicast or address.is_reserved or any(address in network for network in INTERNAL)
    return address.is_global and not internal


def _plain(address: Address) -> Address:
    """::ffff:1.2.3.4 is 1.2.3.4: that is where a connection to it goes."""
    return getattr(address, "ipv4_mapped", None) or address


def _address(text: str) -> Address | None:
    try:
        return None if "%" in text else _plain(ipaddress.ip_address(text))
    except ValueError:
        return None


def _network(text: str) -> Network | None:
    try:
        return None if "%" in text else ipaddress.ip_network(_address(text) or text)
    except ValueError:
        return None


def _ascii(host: str) -> str:
    """A name, or an IPv4 address in four decimals, in lower case and ASCII, without a final dot; nothing where it is
    neither. Other forms of IPv4 (127.1, 0x7f.1, 2130706433) are what names never are: their last part is a number."""
    try:
        name = host.encode("idna").decode("ascii").lower().removesuffix(".")
    except UnicodeError:
        return ""
    labels = name.split(".")
    if len(name) > MAX_HOST or not all(_LABEL.fullmatch(label) and len(label) <= MAX_LABEL for label in labels):
        return ""
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        return name if _address(name) else ""
    return name


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


# ------------------------------------------------------------------------------------------------------ who may come in


def make_token() -> str:
    """A new token: 256 random bits, in characters that fit into a header, a subprotocol and a link."""
    return secrets.token_urlsafe(32)


def checked_token(text: str) -> str:
    """An operator's own token, without white space around it.

    Raises:
        UserError: it is short, or holds what a browser cannot send.
    """
    token = text.strip()
    if len(token) < MIN_TOKEN or not _TOKEN.fullmatch(token):
        raise UserError(
            f"--token_file or JSTREAM_TOKEN: expected a token of {MIN_TOKEN} or more letters, digits, - and _, found "
            f"{len(token)} characters{'' if _TOKEN.fullmatch(token) else ', others among them'}; make one with "
            "`openssl rand -hex 32`"
        )
    return token


def token_matches(given: str | None, wanted: str) -> bool:
    """Whether a token is the right one; the time it takes does not tell how much of it was right."""
    return hmac.compare_digest((given or "").encode("utf-8", "surrogatepass"), wanted.encode()) and bool(wanted)


def bearer_of(authorization: str | None, subprotocols: Sequence[str] = ()) -> str | None:
    """The token that a request brings, in its Authorization header or, from a browser's WebSocket, as a subprotocol."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return next((text.removeprefix("bearer.") for text in subprotocols if text.startswith("bearer.")), None)


def origin_allowed(origin: str | None, host_header: str | None, scheme: str, allowed: Iterable[str] = ()) -> bool:
    """Whether a page of this origin may talk to the server: its own, one that is listed, or no page at all.

    Args:
        origin: the header; None where there is none, as from programs.
        host_header: what the request calls the server.
        scheme: of the request as the server sees it: http behind a proxy that ends TLS, whose origin is to be listed.
        allowed: origins such as `https://app.example.com`.
    """
    if origin is None:
        return True
    own = _origin(f"{ {'ws': 'http', 'wss': 'https'}.get(scheme, scheme) }://{host_header or ''}")
    found = _origin(origin)
    return found is not None and (found == own or found in (_origin(value.removesuffix("/")) for value in allowed))


def checked_origins(values: Iterable[str]) -> tuple[str, ...]:
    """Origins that an operator lists.

    Raises:
        UserError: one is none, so that no page could ever match it.
    """
    origins = tuple(value.strip().removesuffix("/") for value in values)
    for value in origins:
        if _origin(value) is None:
            raise UserError(f"--origin: expected an origin such as https://app.example.com, found {value!r}")
    return origins


def host_allowed(
    host_header: str | None, bound_host: str, allowed: Iterable[str] = (), machine: str | None = None
) -> bool:
    """Whether a request calls the server by a name of its own. One that a foreign page has made its name point here
    (DNS rebinding) does not: a browser takes it for that page's own server.

    Args:
        host_header: the header.
        bound_host: where the server listens. On loopback it answers to loopback's names, elsewhere also to every
            literal address, which no foreign page can claim, and to the machine's host name.
        allowed: further names, with or without `:port`, or whole origins.
        machine: the host name; asked of the system where None.
    """
    place = _host_and_port(host_header or "")
    if place is None:
        return False
    host, port = place
    for entry in allowed:
        listed = _host_and_port(entry.partition("://")[2].rstrip("/") or entry)
        if listed and listed[0] == host and listed[1] in (None, port):
            return True
    bound = bound_host.strip("[]").lower()
    if host in LOOPBACK or host == bound:
        return True
    address = _address(bound)
    if bound == "localhost" or (address and address.is_loopback):
        return False
    own = (socket.gethostname() if machine is None else machine).lower()
    return _address(host) is not None or host in {own, own.partition(".")[0], own.partition(".")[0] + ".local"}


def _host_and_port(text: str) -> tuple[str, int | None] | None:
    place = _PLACE.fullmatch(text)
    host = (str(_address(place[1]) or "") if place[1] else _ascii(place[2])) if place else ""
    return (host, int(place[3]) if place[3] else None) if place and host else None


def _origin(text: str) -> tuple[str, str, int | None] | None:
    scheme, separator, rest = text.partition("://")
    place = _host_and_port(rest)
    if not separator or place is None:
        return None
    return scheme.lower(), place[0], place[1] or PORTS.get(scheme.lower())
