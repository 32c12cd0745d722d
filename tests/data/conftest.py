"""A cache of its own for each test, and small corpora."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("JAXSCALE_CACHE", str(folder))
    return folder


@pytest.fixture
def text_dir(tmp_path, rng):
    """60 files of 1 to 400 characters, some of two to four bytes each."""
    folder = tmp_path / "corpus"
    (folder / "deep" / "er").mkdir(parents=True)
    for i in range(60):
        characters = rng.choice(list("abcdefgh  \n(){}=éß€😀"), int(rng.integers(1, 400)))
        place = folder if i % 3 else folder / "deep" / "er"
        (place / f"doc{i:02}.txt").write_text(f"document {i}: " + "".join(characters), "utf-8", newline="")
    return folder
