"""Which address of this computer a phone can reach, and how that is shown."""

import ipaddress
import socket

from mobiatt_tf.errors import UserError

# Documentation addresses (RFC 5737): "connecting" a datagram socket there sends nothing, it only picks the interface.
_ELSEWHERE = ("192.0.2.1", 9)


def lan_address() -> str:
    """The IPv4 address of the interface that leads out of this computer.

    Raises:
        UserError: there is none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)
        except OSError:
            raise UserError(
                "This computer is in no network that leads out. Join the phone's network, give this computer's address "
                "in it as --address=IP, or reach the phone over USB: --address=localhost and adb reverse."
            ) from None
        return str(probe.getsockname()[0])


def resolved(address: str | None) -> str:
    """The address to serve on: as given by the user (IPv4 or localhost), else that of the local network.

    Raises:
        UserError: it is neither.
    """
    if address is None:
        return lan_address()
    if address == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.IPv4Address(address))
    except ValueError:
        raise UserError(
            f"--address={address} is not an address: give an IPv4 address of this computer, or localhost."
        ) from None


def is_loopback(address: str) -> bool:
    """Whether only this computer itself reaches the address."""
    return ipaddress.IPv4Address(address).is_loopback


def qr_text(url: str, *, colors: bool = False) -> str:
    """A QR code of the address for a terminal: two modules a character, quiet zone included.

    Blocks are the light modules. With `colors` they are white on black whatever the terminal's own colors are.
    """
    import io

    import segno

    text = io.StringIO()
    segno.make(url, error="l", micro=False, boost_error=False).terminal(out=text, border=2, compact=True)
    lines = text.getvalue().splitlines()
    return "\n".join(f"\x1b[97;40m{line}\x1b[0m" if colors else line for line in lines if line)
