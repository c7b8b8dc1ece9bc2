"""Makes the README's picture of the page: ``python -m tests.gateway.screenshot [OUT]``."""

from __future__ import annotations

import base64
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import presence_of_element_located
from selenium.webdriver.support.ui import WebDriverWait

from scripts.repository import REPOSITORY
from tests.support.browsers import running_chromium
from tests.support.gateways import running_gateway
from tests.support.serving import serve

SIZE_PX = (1200, 1000)
# The last one is the one that is shown large. The seeds are nice ones.
PICTURES = (
    ("a small yellow star at the top of a blue background", 11),
    ("on black, a large cyan ring", 3),
    ("a large red heart on a white background", 7),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw three pictures on the page and photograph it; return 0 done."""
    arguments = sys.argv[1:] if argv is None else argv
    out = Path(arguments[0]) if arguments else REPOSITORY / "docs" / "page.png"
    with tempfile.TemporaryDirectory() as folder:
        content = photograph(Path(folder))
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image.save(out, optimize=True)
    print(f"{out}: {image.width}x{image.height}, {out.stat().st_size / 1000:.0f} kB")
    return 0


def photograph(folder: Path) -> bytes:
    """The page with its pictures, as PNG."""
    settings = {"height": 768, "width": 768, "num_inference_steps": 50}
    servers = serve(folder, **settings)
    with (
        closing(servers),
        running_gateway(folder / "gateway", [next(servers).state_dir]) as gateway,
        running_chromium(*SIZE_PX) as driver,
    ):
        driver.get(gateway.url)
        wait = WebDriverWait(driver, 120)
        wait.until(lambda _: "is ready" in driver.find_element(By.ID, "ready").text)
        for number, (prompt, seed) in enumerate(PICTURES, 1):
            for name, value in (("prompt", prompt), ("seed", str(seed))):
                field = driver.find_element(By.ID, f"field-{name}")
                field.clear()
                field.send_keys(value)
            driver.find_element(By.ID, "draw").click()
            newest = (By.CSS_SELECTOR, f"#pictures li:nth-last-child({number})")
            wait.until(presence_of_element_located(newest))
        driver.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
        time.sleep(0.5)  # until the pictures are painted
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {})
        return base64.b64decode(shot["data"])


if __name__ == "__main__":
    sys.exit(main())
