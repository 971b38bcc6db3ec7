"""A CTranslate2 translator that runs in a process of its own.

Once it has run in the process of another contender, decoding by that contender takes longer, in our case by up to two
fifths. The likely cause is that both libraries together have more threads than there are cores, so that OpenMP's
threads sleep between products instead of spinning.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

_loaded: dict[str, Any] = {}  # the translator of this process, if it was started by an `Engine`


class Engine:
    """A converted model in `folder`, computed in CTranslate2's type `compute` on `threads` threads of the CPU.

    If `in_process`, it runs in this process, so that its memory can be measured here.
    """

    def __init__(self, folder: Path, *, compute: str, threads: int, in_process: bool):
        self.pool: ProcessPoolExecutor | None = None
        self.translator: Any = None
        if in_process:
            self.translator = _translator(folder, compute, threads)
            return
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.pool.submit(_load, folder, compute, threads).result()

    def translate(self, words: list[list[str]], *, beam: int, tokens: int) -> list[list[str]]:
        """The best translation of each sentence, of exactly `tokens` words."""
        options = {"beam_size": beam, "max_decoding_length": tokens, "min_decoding_length": tokens}
        translations: list[list[str]] = self._call(_translate, words, options)
        return translations

    def log_probabilities(self, source: list[list[str]], target: list[list[str]]) -> list[list[float]]:
        """The log probabilities of each target's words and of its end."""
        scores: list[list[float]] = self._call(_score, source, target)
        return scores

    def _call(self, function: Any, *arguments: Any) -> Any:
        if self.pool is None:
            return function(self.translator, *arguments)
        return self.pool.submit(_call_loaded, function, *arguments).result()


def _translator(folder: Path, compute: str, threads: int) -> Any:
    import ctranslate2

    return ctranslate2.Translator(
        str(folder), device="cpu", compute_type=compute, inter_threads=1, intra_threads=threads
    )


def _load(folder: Path, compute: str, threads: int) -> None:
    _loaded["translator"] = _translator(folder, compute, threads)


def _call_loaded(function: Any, *arguments: Any) -> Any:
    return function(_loaded["translator"], *arguments)


def _translate(translator: Any, words: list[list[str]], options: dict[str, int]) -> list[list[str]]:
    return [result.hypotheses[0] for result in translator.translate_batch(words, length_penalty=1.0, **options)]


def _score(translator: Any, source: list[list[str]], target: list[list[str]]) -> list[list[float]]:
    return [list(result.log_probs) for result in translator.score_batch(source, target)]
