"""Translation as the trainer and the evaluator see it: smoothed cross-entropy, tokenizers, text, BLEU."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from common.decoding.contract import Decoder, Hypothesis
from common.decoding.decode import decode
from common.decoding.given import score
from common.decoding.options import DecodingOptions
from common.errors import UserError
from common.nn.attention import record_attention
from common.task import Adopted, Answer, Batch, Goal, Split
from seq2seq.criterion import cross_entropy as loss
from seq2seq.criterion.cross_entropy import LossOptions
from seq2seq.data.protocol import TextData
from seq2seq.evaluation.attention_pictures import picture
from seq2seq.evaluation.scores import TranslationMetric
from seq2seq.importing import adopt as importing
from seq2seq.tasks.reading import lines
from seq2seq.tokenizers import marian as foreign_tokenizers
from seq2seq.tokenizers.bpe import BOS, EOS, SPECIAL_NAMES

LINES_PER_BATCH = 64  # lines of a user's file that are translated at once


class Translation:
    """One translation for each sentence. `data` may stay unopened for prediction alone."""

    goal = Goal("bleu", higher_is_better=True)
    handed_on: ClassVar[tuple[str, ...]] = ("vocabularies", "joint")

    def __init__(self, *, data: TextData, loss: LossOptions, predict: DecodingOptions, keep_tokenizers: bool):
        """Describe the task.

        Args:
            data: pairs of sentences.
            loss: see LossOptions.
            predict: how translations are looked for.
            keep_tokenizers: a run that starts from a checkpoint takes its tokenizers, so that its embeddings mean
                something; false learns new ones from the new data.
        """
        self.data, self.loss_options, self.options = data, loss, predict
        self.keep_tokenizers = keep_tokenizers

    def model_arguments(self) -> dict[str, Any]:
        """Sizes of the vocabularies, and whether they are one."""
        source, target = self.data.tokenizers()
        return {
            "vocabularies": (source.size, target.size),
            "joint": foreign_tokenizers.share_vocabulary(source, target),
        }

    def state(self) -> dict[str, Any]:
        """The tokenizers, each as a text: one when joint, or those of source and target."""
        source, target = self.data.tokenizers()
        return {"tokenizers": [source.state()] if source is target else [source.state(), target.state()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the tokenizers from a checkpoint; raises UserError when it has none, as a file of another program."""
        if not state.get("tokenizers"):
            raise UserError(
                "The checkpoint holds no tokenizers, and without them its numbers are no words; import it together "
                "with its vocabulary."
            )
        tokenizers = [foreign_tokenizers.restore(text) for text in state["tokenizers"]]
        self.data.use(tokenizers[0], tokenizers[-1])

    def inherit(self, state: dict[str, Any]) -> None:
        """Before the model is built: take the tokenizers of the checkpoint that a new run starts from."""
        if self.keep_tokenizers and state.get("tokenizers"):
            self.restore(state)

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Files of Marian (in transformers' layout) and of fairseq; see seq2seq/importing/adopt.py."""
        return importing.adopt(tensors, folder)

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """Number of real target tokens, each sentence's end among them."""
        return {"tokens": float(batch["target_lengths"].sum())}

    def sizes(self, batch: Batch) -> dict[str, float]:
        """The former name of `normalisers`, which users' tasks may call for one version."""
        return self.normalisers(batch)

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean smoothed cross-entropy of the step's target tokens, and `nll`, the same without smoothing, in nats."""
        logits = model(batch["source"], batch["source_lengths"], batch["target_in"])
        smoothed, plain = loss.cross_entropy(self.loss_options, logits, batch["target_out"])
        return smoothed / normalisers["tokens"], {"nll": plain / normalisers["tokens"]}

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """One answer per sentence: text, score, and tokens (ids without BOS and EOS) of its best translation.

        Also `candidates` (text and score of each, best first) where several are asked for; `attention` (h, T, S) where
        it is; and where the batch has targets reference_log_probability (nats) and reference_tokens. A sentence of
        nothing but white space is translated by nothing.
        """
        _check_lengths(model, batch)
        given = self.options.method == "given"
        written = [i for i, text in enumerate(batch["source_texts"]) if given or text.strip()]
        found = dict(zip(written, self._translations(model, batch, written), strict=True))
        nothing = [Hypothesis([], 0.0, 0.0, True)]
        answers = [self._answer(found.get(i, nothing)) for i in range(len(batch["ids"]))]
        if "target_out" in batch:
            for answer, (log_probability, tokens) in zip(answers, self._references(model, batch), strict=True):
                answer |= {"reference_log_probability": log_probability, "reference_tokens": tokens}
        if self.options.attention:
            for i in written:
                answers[i]["attention"] = self._attention(model, batch, i, answers[i]["tokens"])
        return answers

    def _translations(self, model: nn.Module, batch: Batch, rows: list[int]) -> list[list[Hypothesis]]:
        source, lengths = batch["source"][rows], batch["source_lengths"][rows]
        decoder, special = cast(Decoder, model), self.data.tokenizers()[1].special
        if self.options.method != "given":
            return decode(decoder, source, lengths, self.options, special, [batch["ids"][i] for i in rows])
        targets, counts = batch["target_out"][rows], batch["target_lengths"][rows]
        scored = score(decoder, source, lengths, targets, counts, special)
        return [
            [Hypothesis(words[: count - 1], total / self.options.divisor(count), total, True)]
            for words, (total, count) in zip(targets.tolist(), scored, strict=True)
        ]

    def _answer(self, hypotheses: list[Hypothesis]) -> Answer:
        target = self.data.tokenizers()[1]
        texts = [target.decode(hypothesis.tokens) for hypothesis in hypotheses]
        answer: Answer = {"text": texts[0], "score": hypotheses[0].score, "tokens": hypotheses[0].tokens}
        if self.options.candidates > 1:
            pairs = zip(texts, hypotheses, strict=True)
            answer["candidates"] = [{"text": text, "score": hypothesis.score} for text, hypothesis in pairs]
        return answer

    def _references(self, model: nn.Module, batch: Batch) -> list[tuple[float, int]]:
        """Log probability in nats, not smoothed, and number of tokens of each given target."""
        logits = model(batch["source"], batch["source_lengths"], batch["target_in"])  # (B, T, V)
        plain = loss.token_losses(logits, batch["target_out"])  # (B, T)
        return list(zip((-plain.double().sum(1)).tolist(), batch["target_lengths"].tolist(), strict=True))

    def _attention(self, model: nn.Module, batch: Batch, i: int, tokens: list[int]) -> Tensor:
        """Where each token of a translation, its end included, looked in its source: (h, T, S) of the last layer."""
        length = int(batch["source_lengths"][i])
        source = batch["source"][i : i + 1, :length]
        target_in = source.new_tensor([[BOS, *tokens]])
        with record_attention(model) as maps:
            model(source, batch["source_lengths"][i : i + 1], target_in)
        names = [name for name in maps if name.endswith("cross_attention") and maps[name]]
        if not names:
            raise UserError(
                f"task.predict.attention: {type(model).__name__} has no module named cross_attention; use false."
            )
        return maps[names[-1]][0][0].float().cpu()

    def read(self, input: str) -> Iterator[Batch]:
        """A text file, or "-" for a pipe or a terminal, as batches of lines as they come.

        With method=given each line holds a sentence, a tab, and its translation.
        """
        for group in lines(input, LINES_PER_BATCH):
            yield self.data.collate([self._view(line.text, line.number) for line in group])

    def _view(self, text: str, number: int) -> dict[str, Any]:
        if self.options.method != "given":
            return self.data.view(text, id=number)
        source, tab, target = text.partition("\t")
        if not tab:
            raise UserError(f"Line {number} has no tab; method=given expects a sentence, a tab, and its translation.")
        return self.data.view(source, target, number)

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """One line for each translation: its text; of several, or given ones, line number, score and text with tabs.

        With attention also an SVG picture of each sentence under `folder`.
        """
        numbered = self.options.candidates > 1 or self.options.method == "given"
        for i, (number, answer) in enumerate(zip(batch["ids"], answers, strict=True)):
            if "attention" in answer:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number:06d}.attention.svg").write_text(self._picture(batch, i, answer), encoding="utf-8")
            for one in answer.get("candidates", [answer]):
                text = re.sub(r"[\r\n]", " ", one["text"])  # a line stays a line
                yield f"{number}\t{one['score']:.4f}\t{text}" if numbered else text

    def _picture(self, batch: Batch, i: int, answer: Answer) -> str:
        source, target = self.data.tokenizers()
        ids = batch["source"][i, : int(batch["source_lengths"][i]) - 1].tolist()
        end = SPECIAL_NAMES[EOS]
        pieces = [*source.pieces(ids), end], [*target.pieces(answer["tokens"]), end]
        return picture(answer["attention"], *pieces, f"{batch['source_texts'][i]} -> {answer['text']}")

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> None:
        """None: translations are no pictures."""

    def metric(self, split: Split) -> TranslationMetric:
        """BLEU and its relatives on `split`, without regard to case where the tokenizer knows none."""
        lowercase = self.data.tokenizers()[1].options.lowercase
        categories = self.data.categories(split)
        return TranslationMetric(self.data.source, self.data.target, self.data.count(split), categories, lowercase)

    def advice(self, pretrained: bool) -> list[str]:
        """What the data call for before the first step: nothing."""
        return []

    def alarms(self, answers: list[Answer]) -> list[str]:
        """What the newest answers call for: all sentences translated alike."""
        texts = {answer["text"] for answer in answers}
        if len(answers) < 10 or len(texts) > 1:
            return []
        return [
            f'all sentences are translated as "{texts.pop()[:60]}": lower optimizer.lr, or give schedule.warmup more '
            "steps."
        ]


def _check_lengths(model: nn.Module, batch: Batch) -> None:
    """Raise UserError for a source that is longer than the model takes, where it says so (`longest`), naming it."""
    lengths: list[int] = batch["source_lengths"].tolist()
    longest = getattr(model, "longest", max(lengths))
    for name, length in zip(batch["ids"], lengths, strict=True):
        if length > longest:
            raise UserError(
                f"Sentence {name} has {length:,} tokens, more than model.longest={longest:,}; cut it into sentences, "
                "or raise that limit."
            )
