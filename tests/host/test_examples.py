"""The examples in Python run from beginning to end, as a reader would run them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from rotation import often

FOLDER = Path(__file__).parents[2] / "examples" / "python"
EXAMPLES = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if path.stem != "tiny"}
#: The last line that each one prints, which says what it is good for.
SAYS = {
    "controlnet": "the ControlNet changes the latents by",
    "drop_in": "from the same noise",
    "image_to_video": "a picture moves for 4 frames of 32 x 32 pixels",
    "image_to_image": "a picture of 16 x 16 pixels",
    "lora": "without it they are the same again: True",
    "own_loop": "latents of shape (1, 4, 8, 8)",
    "video": "4 frames of 16 x 16 pixels",
    "whole_generation": "latents of shape (1, 4, 8, 8)",
}


#: Tried every time; what the others do is tried by tests of the drop-in, in every run too.
OFTEN = ("own_loop", "whole_generation")


@pytest.mark.parametrize("name", often(OFTEN, EXAMPLES))
def test_example(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)  # pictures are written where the example is run
    runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out.splitlines()[-1]
