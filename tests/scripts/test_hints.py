"""scripts.hints: what a message tells the user to run next."""

from __future__ import annotations

from scripts.hints import option, to_run


def test_a_clone_is_told_of_make() -> None:
    assert to_run("stop") == "make stop"
    assert to_run("pack", model_id="org/name") == "make archive MODEL_ID=org/name"
    assert to_run("serve", run_dir="my run") == "make serve RUN_DIR='my run'"
    assert to_run("pack", "--config-from 'a b'", pipeline="x") == (
        """make archive PIPELINE=x ARGS='--config-from '"'"'a b'"'"''"""
    )
    assert to_run("pack", force="1") == "make archive FORCE=1"
    assert option("name") == "NAME="
