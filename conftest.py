"""What every test run shares: no network, two threads in all, and the examples of the documents as tests.

Every ```python block of README.md and docs/, and every `>>>` in a docstring of src/, is a test (Sybil). The
blocks of one document share a namespace; a docstring starts from its module's names, as with `doctest`. Each
document runs in an empty folder of its own, so examples may save files. A block that cannot run, because it
needs the network for instance, says so in a comment before it:

    <!--- skip: next "downloads a model" -->

and in a docstring with `# doctest: +SKIP` on its line.
"""

from __future__ import annotations

import doctest
import os
from bisect import bisect
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

import pytest
import torch
from sybil import Document, Example, Region, Sybil
from sybil.document import PythonDocStringDocument
from sybil.example import NotEvaluated
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer
from sybil.parsers.rest import DocTestParser
from sybil.python import import_path

from lottery_tickets._data import model_folder, text_file
from lottery_tickets.errors import CheckpointError

# Side by side in several processes (pytest -n 2), each takes its part of the two.
THREADS = max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(THREADS)


class DocstringsOfModule(PythonDocStringDocument):
    """A module's docstrings, each with a namespace of its own."""

    def examples(self) -> Iterator[Example]:
        starts = sorted(start for start, _, _ in self.extract_docstrings(self.text))
        namespaces = [{} for _ in range(len(starts) + 1)]
        for example in super().examples():
            example.namespace = namespaces[bisect(starts, example.start)]
            yield example

    def import_document(self, example: Example) -> None:
        if "__name__" not in example.namespace:
            example.namespace.update(vars(import_path(Path(self.path))))
        raise NotEvaluated


def refuse_other_python_fences(document: Document) -> Iterable[Region]:
    """A block that a reader takes for Python but Sybil would pass over is an error, not a silent gap."""
    for fence in FencedCodeBlockLexer(language=r"[^\n]+")(document):
        language = fence.lexemes["language"]
        if language != "python" and language.lstrip(" {.").lower().startswith("py"):
            where = f"{document.path}, {document.line_column(fence.start)}"
            raise ValueError(f"{where}: a block of Python opens with '```python' and no more, not {language!r}")
    return ()


@pytest.fixture(scope="module")
def real_material(document_folder: Path) -> None:
    """Links, in a document's folder, to the model and the text that its examples use."""
    try:
        places = {"SmolLM2-135M-Instruct": model_folder(), "english.txt": text_file()}
    except CheckpointError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    for name, place in places.items():
        Path(document_folder / name).symlink_to(place)


@pytest.fixture(scope="module")
def document_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of a document's examples."""
    folder = tmp_path_factory.mktemp("document")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "src"))  # what examples start tests this tree too
        yield folder
    torch.set_num_threads(THREADS)


documents = Sybil(
    parsers=[
        PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS),
        SkipParser(),
        refuse_other_python_fences,
    ],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    fixtures=["document_folder", "real_material"],
)
docstrings = Sybil(
    parsers=[DocTestParser(optionflags=doctest.ELLIPSIS)],
    path="src",
    pattern="*.py",
    fixtures=["document_folder"],
    document_types={".py": DocstringsOfModule},
)
pytest_collect_file = (documents + docstrings).pytest()
