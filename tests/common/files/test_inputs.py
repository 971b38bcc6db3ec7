"""The files that input= names: folders at any depth, patterns, standard input, and no picture that predict.py wrote."""

import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from common.data.images import read_image
from common.errors import UserError
from common.files.inputs import ANSWER_PICTURES, InputFile, find, read_each, reading_note
from common.files.names import answer_file
from common.files.output import write_answer

ROOT = Path(__file__).parents[3]


def names(input: str | Path, problems: list[str] | None = None) -> list[str]:
    return [file.name for file in find(str(input), (), [] if problems is None else problems)]


def read(file: InputFile) -> list[tuple[int, ...]]:
    return [tuple(read_image(file.path, content=file.content).shape)]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write images of 5 x 4 pixels by their paths below the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(*paths: str) -> None:
        for path in paths:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (5, 4)).save(path, "PNG")

    return write


def test_a_folder_is_read_at_any_depth_and_its_folders_stay_in_the_names(write: Callable[..., None]) -> None:
    write("photos/b.png", "photos/a.JPG", "photos/day 1/b.png", "photos/day 1/x.jpg/c.png", "photos/.cache/d.png")
    Path("photos/notes.txt").touch()
    assert names("photos") == ["a.JPG", "b.png", "day 1/b.png", "day 1/x.jpg/c.png"]
    assert names("photos/a.JPG") == ["a.JPG"] and names("photos/day 1/") == ["b.png", "x.jpg/c.png"]
    answers = [answer_file(Path("out"), name, ".boxes.jpg") for name in names("photos")]
    assert len({*answers}) == 4 and answers[2] == Path("out/day 1/b.png.boxes.jpg")


def test_a_folder_that_links_to_itself_is_read_once(write: Callable[..., None]) -> None:
    write("photos/a.png", "more/b.png")
    os.symlink("..", "photos/up")
    os.symlink("../more", "photos/more")
    assert names("photos") == ["a.png", "more/b.png"] or names("photos") == ["a.png", "up/more/b.png"]


def test_a_pattern_stands_for_the_images_that_match(write: Callable[..., None]) -> None:
    write("p/a1.png", "p/a2.png", "p/b.jpg", "p/s/a1.png", "p/s/t/c.png", "p/.h.png")
    Path("p/a3.txt").touch()
    assert names("p/a*") == ["a1.png", "a2.png"]
    assert names("p/*.png") == ["a1.png", "a2.png"]
    assert names("p/**/a?.png") == ["a1.png", "a2.png", "s/a1.png"] == names(Path("p/**/a?.png").absolute())
    assert names("p/*") == ["a1.png", "a2.png", "b.jpg", "s/a1.png", "s/t/c.png"] and names("./p/**") == names("p")
    assert names("p/[!a].*") == ["b.jpg"]
    os.chdir("p/s")
    assert names("../*.jpg") == ["b.jpg"]
    assert names("../*/../../p/b.jpg") == ["b.jpg"], "no name leads out of the output"


def test_an_existing_path_wins_over_its_reading_as_a_pattern_and_a_note_says_so(write: Callable[..., None]) -> None:
    write("p/a[1].png", "p/a1.png", "q[a]/x.png")
    assert names("p/a[1].png") == ["a[1].png"] and names("q[a]") == ["x.png"]
    note = reading_note("p/a[1].png")
    assert (
        note == "input=p/a[1].png is the file of this name, and no pattern for 1 other paths (the first is p/a1.png)."
    )
    for unambiguous in ("q[a]", "p/*.png", "p/a1.png", "p", "-"):
        assert reading_note(unambiguous) is None


@pytest.mark.parametrize(
    ("input", "sentence"),
    [
        ("nothing", "nothing is neither an image nor a folder of images, nor a pattern; give the path of one."),
        ("photos/notes", "photos/notes is neither an image nor a folder of images, nor a pattern"),
        ("empty", "The folder empty holds no image (.avif, .bmp, .cr2"),
        ("x/*.jpg", "Among 0 matches of input=x/*.jpg there is no image (.avif, "),
        ("e*", "Among 1 matches of input=e* there is no image (.avif, "),
    ],
)
def test_an_input_without_images_is_one_sentence(input: str, sentence: str, write: Callable[..., None]) -> None:
    Path("empty").mkdir()
    Path("empty/notes.txt").touch()
    with pytest.raises(UserError) as error:
        names(input)
    assert str(error.value).startswith(sentence)


def test_a_folder_that_cannot_be_read_is_listed_and_the_others_are_read(
    write: Callable[..., None], without_privileges: Any
) -> None:
    write("photos/a.png", "photos/locked/b.png")
    os.chmod("photos/locked", 0)
    problems: list[str] = []
    with without_privileges():
        assert names("photos", problems) == ["a.png"]
        sentence = "The folder photos/locked cannot be read (Permission denied); correct its permissions."
        assert problems == [sentence]
        with pytest.raises(UserError, match=r"^The folder photos/locked cannot be read"):
            names("photos/locked")


@pytest.mark.parametrize(
    "kinds",
    [
        (".boxes.jpg", ".boxes.json"),
        (".lanes.jpg", ".lanes.json"),
        (".attention.png", ".classes.json"),
        (".attention.png", ".boxes.json"),
        (".encoder.png", ".boxes.json"),
    ],
)
def test_pictures_that_predict_wrote_are_no_input(
    kinds: tuple[str, str], write: Callable[..., None], tmp_path: Path
) -> None:
    """Files with names of the same form remain inputs."""
    long = f"{'x' * 250}.png"
    write("a.png", "a.front.png", "b.left.png", "sub/c.png", long)
    files = find(".", (), [])
    for folder in (Path("predictions"), Path("sub/old")):
        for file in [*files, InputFile(Path("-"), "stdin")]:
            write(str(answer_file(folder, file.name, kinds[0])))
            write_answer(answer_file(folder, file.name, kinds[1]), file.path, {"objects": []})
    write("b.png.boxes.jpg", "b.attention.png", "c.boxes.jpg")
    Path("b.png.boxes.json").write_text("[]")
    Path("b.classes.json").write_text('{"file": "a.png"}')
    Path("c.boxes.json").write_text("broken")
    files = [*find("b.png.boxes.jpg", (), []), *find("b.attention.png", (), []), *find("c.boxes.jpg", (), []), *files]
    files.sort()
    assert find(".", (), []) == files
    assert len(find("**/*.png", (), [])) == len(files) - 2
    with pytest.raises(UserError, match=r"holds no image but 6 that predict\.py wrote; give another folder"):
        names("predictions")


class Pipe(SimpleNamespace):
    """Standard input with this content."""

    def isatty(self) -> bool:
        return self.content is None


def test_standard_input_is_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    image = io.BytesIO()
    Image.new("RGB", (5, 4)).save(image, "PNG")
    monkeypatch.setattr(sys, "stdin", Pipe(content=b"", buffer=io.BytesIO(image.getvalue())))
    assert list(read_each("-", lambda file: [(file.name, *read(file))], [])) == [("stdin", (3, 4, 5))]
    monkeypatch.setattr(sys, "stdin", Pipe(content=b"", buffer=io.BytesIO(b"no image")))
    with pytest.raises(UserError, match="The image - is broken or no image"):
        list(read_each("-", read, []))


@pytest.mark.parametrize(
    ("stdin", "state"),
    [(None, "closed"), (Pipe(content=None), "a terminal"), (Pipe(content=b"", buffer=io.BytesIO()), "empty")],
)
def test_standard_input_without_an_image_is_one_sentence(
    stdin: Any, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(UserError, match=f"input=- reads an image from standard input, which is {state}; give a pipe"):
        list(read_each("-", read, []))


def test_each_image_of_a_folder_is_read_and_the_others_have_a_reason(write: Callable[..., None]) -> None:
    write("p/a.png", "p/d.jfif", "p/e.JPE", "p/f.avif", "p/g.ppm")  # Pillow looks at the content
    Path("p/b.jpg").write_text("broken")
    Path("p/c.heic").write_text("of a telephone")
    Path("p/._a.png").write_bytes(b"\0\5\26\7")
    Path("p/x.jpg").mkdir()
    Path("p/notes.txt").touch()
    reasons: list[str] = []
    assert list(read_each("p", read, reasons)) == [(3, 4, 5)] * 5
    appledouble, broken, unsupported = reasons
    assert appledouble == "p/._a.png holds metadata of macOS on a.png and is no image; remove it."
    assert "b.jpg is broken or no image" in broken and "c.heic is broken or no image" in unsupported


def test_the_error_for_a_single_image_is_raised(write: Callable[..., None]) -> None:
    Path("b.jpg").write_text("broken")
    with pytest.raises(UserError, match=r"b\.jpg is broken"):
        next(read_each("./b.jpg", read, []))


@pytest.mark.timeout(60)
def test_a_named_pipe_is_no_image(write: Callable[..., None]) -> None:
    write("p/b.png")
    os.mkfifo("p/a.png")
    unanswered: list[str] = []
    assert len(list(read_each("p", read, unanswered))) == 1
    reason = "it is a named pipe and no regular file"
    assert unanswered == [f"The image p/a.png cannot be read ({reason}); replace it or remove it."]
    with pytest.raises(UserError, match=r"a.png is neither an image nor a folder"):
        list(read_each("p/a.png", read, unanswered))


def test_every_picture_that_a_task_writes_is_known_as_an_answer() -> None:
    """Otherwise a folder with answers would be read as one with more images."""
    files = [file for wing in ("detr", "vit", "seq2seq") for file in (ROOT / wing).rglob("*.py")]
    sources = [file.read_text(encoding="utf-8") for file in files]
    endings = {found for text in sources for found in re.findall(r'"(\.[a-z]+\.(?:jpg|png|mp4))"', text)}
    assert ".boxes.jpg" in endings and endings == ANSWER_PICTURES.keys()
