"""The report in headless Chromium."""

from pathlib import Path
from typing import Any

import pytest

from tests.chromium import start_chromium
from tflite.reporting import page
from tflite.reporting.collect import Report, collect
from tflite.reporting.drawing import Mark
from tflite.reporting.figures import figures


@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium(paths: list[Path], hostile: tuple[Path, str], tmp_path: Path, width: int) -> None:
    """No message on the console, nothing wider than the screen, every chart drawn, arrow keys read it out."""
    with start_chromium(tmp_path / "profile") as driver:
        override = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", override)
        for name, found in (("hostile", collect([hostile[0]])), ("all", collect(paths))):
            (tmp_path / f"{name}.html").write_text(page.render(found))
            driver.get((tmp_path / f"{name}.html").as_uri())
            assert driver.get_log("browser") == []
            root = "document.documentElement"
            assert driver.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
            outside = """return [...document.querySelectorAll('.panel svg')].filter(svg => svg.checkVisibility())
                .flatMap(svg => [...svg.querySelectorAll('text')].filter(text =>
                    text.getBoundingClientRect().right > svg.getBoundingClientRect().right + 14))
                .map(text => text.textContent)"""
            assert driver.execute_script(outside) == []
            shown = driver.execute_script(
                "return [...document.querySelectorAll('.panel')].filter(panel => panel.checkVisibility()).map("
                "panel => [...panel.querySelectorAll('svg[role=group]')].filter(svg => svg.checkVisibility()).length)"
            )
            assert len(shown) >= 4
            assert set(shown) == {1}  # the wide or the narrow drawing, never both
        assert_arrow_keys_read_the_chart(driver, found)


def assert_arrow_keys_read_the_chart(driver: Any, found: Report) -> None:
    from selenium.webdriver.common.keys import Keys

    svg = next(each for each in driver.find_elements("css selector", "#devices svg") if each.is_displayed())
    driver.execute_script("arguments[0].focus()", svg)
    (panel,) = figures(found)[0].panels
    expected = [item.tip for item in panel.draw(324.0).items if isinstance(item, Mark)]
    for words in expected[:3]:
        driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
        tip = driver.find_element("id", "tip")
        assert tip.is_displayed()
        assert tip.text == " ".join(words.split())
    driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not driver.find_element("id", "tip").is_displayed()
