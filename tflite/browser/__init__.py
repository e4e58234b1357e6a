"""The benchmark in a browser: a page on the local network that any phone can open.

`device` is the entry, `job` says what the page is told, `protocol` what it may answer, `site` what is served, `server`
how; `page/` is what the phone runs.
"""

from tflite.browser.device import define_flags, from_flags

__all__ = ["define_flags", "from_flags"]
