from __future__ import annotations

import pytest

from scripts.torchserve.failures import has_failed_to_load, load_failure, refusal

TIME = "2026-01-02 03:04:05.678"
START = f"""{TIME} INFO  ModelServer Loading initial models: toy.mar
"""
BAD_CRC = f"""{START}{TIME} WARN  ModelServer Failed to load model: toy.mar
java.util.zip.ZipException: invalid entry CRC (expected 0x132eb4c3 but got 0x56339d1c)
\tat java.util.zip.ZipInputStream.read(Unknown Source) ~[?:?]
\tat org.pytorch.serve.ModelServer.main(ModelServer.java:105) [model-server.jar:?]
{TIME} INFO  ModelServer Initialize Inference server with: EpollServerSocketChannel.
"""
DISK_FULL = f"""{START}{TIME} WARN  ModelServer Failed to load model: toy.mar
org.pytorch.serve.archive.DownloadArchiveException: Failed to copy toy.mar
\tat org.pytorch.serve.ModelServer.main(ModelServer.java:105) [model-server.jar:?]
Caused by: java.io.IOException: No space left on device
\t... 12 more
"""
TRACEBACK = f"""{TIME} INFO  MODEL_LOG Traceback (most recent call last):
{TIME} INFO  MODEL_LOG   File "inner.py", line 1, in inner
{TIME} INFO  MODEL_LOG KeyError: 'of the library'
{TIME} INFO  MODEL_LOG Failed to load model toy, exception 'of the library'
{TIME} ERROR WorkerThread Backend worker error
"""
REFUSED = (
    f"{START}{TIME} WARN  MODEL_LOG cannot serve this model: max_rows: 0 is below 1\n{TRACEBACK}"
)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            BAD_CRC,
            "toy.mar could not be unpacked\njava.util.zip.ZipException: invalid entry CRC "
            "(expected 0x132eb4c3 but got 0x56339d1c)",
        ),
        (
            DISK_FULL,
            "toy.mar could not be unpacked\n"
            "org.pytorch.serve.archive.DownloadArchiveException: Failed to copy toy.mar\n"
            "Caused by: java.io.IOException: No space left on device",
        ),
        (REFUSED, "max_rows: 0 is below 1"),
    ],
    ids=["bad CRC", "disk full", "refused by the handler"],
)
def test_the_reason_is_shown(log: str, expected: str) -> None:
    assert has_failed_to_load(log)
    assert load_failure(log) == expected


def test_what_has_been_mended_since_is_no_reason() -> None:
    loaded = f"{TIME} INFO  MODEL_LOG StableDiffusionPipeline is ready on cpu after 1.2 s\n"
    assert refusal(REFUSED) == refusal(loaded + REFUSED) == "max_rows: 0 is below 1"
    assert refusal(REFUSED + loaded) is None


def test_without_a_word_of_ours_the_exception_is_shown() -> None:
    assert load_failure(START + TRACEBACK).splitlines()[0] == "KeyError: 'of the library'"
    assert refusal(START + TRACEBACK) is None


def test_of_a_worker_that_says_no_reason_the_last_lines_are_shown() -> None:
    lines = [f"{TIME} INFO  MODEL_LOG line {number}\n" for number in range(50)]
    assert load_failure("".join(lines)).splitlines() == [f"line {i}" for i in range(30, 50)]


def test_a_server_that_is_starting_has_not_failed() -> None:
    assert not has_failed_to_load(START)
