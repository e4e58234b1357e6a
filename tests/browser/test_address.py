"""Addresses as people give them, as browsers write them, and as a phone's camera reads them."""

import pytest

from mobiatt_tf.errors import UserError
from tflite.browser import address
from tflite.browser.site import origin_of


def test_origins_are_those_that_browsers_send() -> None:
    assert origin_of(True, "192.168.1.5", 443) == "https://192.168.1.5"
    assert origin_of(False, "192.168.1.5", 443) == "http://192.168.1.5:443"
    assert origin_of(False, "localhost", 80) == "http://localhost"


def test_addresses() -> None:
    assert address.resolved("localhost") == "127.0.0.1"
    assert address.resolved("192.168.1.5") == "192.168.1.5"
    for wrong in ("phone.local", "::1", "1.2.3", "0x7f.1", ""):
        with pytest.raises(UserError, match="is not an address"):
            address.resolved(wrong)


def test_a_computer_without_a_network_can_still_be_told_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        address, "_ELSEWHERE", ("255.255.255.255", 9)
    )  # refused by the kernel: a socket without broadcast
    with pytest.raises(UserError, match=r"in no network .* --address=IP, .* --address=localhost and adb reverse"):
        address.resolved(None)


def test_the_printed_qr_code_says_the_address() -> None:
    """Reads the printed half blocks back into modules and compares them with the code's own, light on dark."""
    import segno

    url = "https://192.168.100.100:54321/Rl9kB7Vn3wXzQy1mT5cA8g/"
    lines = address.qr_text(url).splitlines()
    dark = {" ": (1, 1), "▀": (0, 1), "▄": (1, 0), "█": (0, 0)}
    rows = [[dark[character][half] for character in line] for line in lines for half in (0, 1)]
    code = segno.make(url, error="l", micro=False, boost_error=False)
    expected = [list(map(int, row)) for row in code.matrix_iter(border=2)]
    assert [row[: len(expected)] for row in rows[: len(expected)]] == expected
    assert len(lines[0]) <= 60
    colored = address.qr_text(url, colors=True).splitlines()
    assert colored == [f"\x1b[97;40m{line}\x1b[0m" for line in lines]
