"""Export a translator for CTranslate2 (Klein et al. 2020), whose own engine decodes on the CPU, in fp32 or int8."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.decoding.decode import decode
from common.decoding.options import DecodingOptions
from common.errors import UserError
from common.nn.attention import Attention
from common.nn.linear import Factored, FactoredProjections, Linear, Projections
from common.nn.positions import sine
from scripts.exporting import tokenizer_files
from scripts.exporting.plan import Comparison
from scripts.exporting.timing import ROUNDS
from scripts.exporting.translation import COMPARED_LENGTHS, sample_sentences
from scripts.verify.comparison import relative_difference
from seq2seq.models.transformer import Transformer
from seq2seq.tasks.translation import Translation
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, SPECIAL, UNK

Format = Literal["ctranslate2", "ctranslate2_int8"]
COMPUTE_TYPES: dict[Format, str] = {"ctranslate2": "float32", "ctranslate2_int8": "int8"}
ACTIVATIONS = {nn.ReLU: "RELU", nn.SiLU: "SWISH", nn.GELU: "GELU"}  # CTranslate2's names
COUNT, SOURCE_LENGTH, NEW_TOKENS, BEAM = 8, 20, 24, 4  # of the sentences that are translated and timed

Search = Callable[[], list[list[int]]]


class Contender(NamedTuple):
    """A translator, and what CTranslate2 read back, with its words: the vocabularies' entries in the order of our ids.

    `options` are those of decoding.
    """

    model: Transformer
    options: DecodingOptions
    engine: Any  # a ctranslate2.Translator
    source: list[str]
    target: list[str]


def write(model: nn.Module, task: Any, folder: Path, form: Format) -> Contender:
    """Write the files of `form` to `folder`, and read them back on PyTorch's number of threads.

    Raises UserError for a model that CTranslate2 cannot express.
    """
    import ctranslate2

    translator = supported(model, task)
    source, target = (entries(tokenizer) for tokenizer in task.data.tokenizers())
    options = task.options
    longest_target = int(options.longest_factor * translator.longest) + options.longest_extra
    compared = max(NEW_TOKENS, *(steps for _, _, steps in COMPARED_LENGTHS))
    spec = specification(translator, 1 + max(translator.longest, longest_target, compared))
    spec.register_source_vocabulary(source)
    spec.register_target_vocabulary(target)
    config = spec.config
    config.unk_token, config.bos_token, config.eos_token = target[UNK], target[BOS], target[EOS]
    config.decoder_start_token = target[BOS]
    spec.validate()
    spec.optimize(COMPUTE_TYPES[form])
    folder.mkdir()
    spec.save(str(folder))
    threads = torch.get_num_threads()
    engine = ctranslate2.Translator(
        str(folder), device="cpu", compute_type=COMPUTE_TYPES[form], inter_threads=1, intra_threads=threads
    )
    return Contender(translator, options, engine, source, target)


def supported(model: nn.Module, task: Any) -> Transformer:
    """Return the model; raises UserError if its task or architecture is not one that this file can export."""
    reason = None
    if not isinstance(task, Translation) or type(model) is not Transformer:
        reason = f"this is a {type(model).__name__}"
    elif model.encoder.norm is not None and not isinstance(model.encoder.norm, nn.Identity):
        reason = "this one has model.blocks.pre_norm=true"
    elif any(not _is_plain(module, model) for module in model.modules()):
        reason = "this one was compressed"
    if reason:
        raise UserError(
            f"--format ctranslate2 is for uncompressed Transformer translators with post-norm blocks, but {reason}; "
            "give --format torch,onnx."
        )
    assert isinstance(model, Transformer)
    return model


def _is_plain(module: nn.Module, model: Transformer) -> bool:
    """Whether a module is no product of low rank and, if it is an attention, has all its heads."""
    if isinstance(module, Factored | FactoredProjections):
        return False
    if not isinstance(module, Attention):
        return True
    first: Any = (*model.encoder.blocks, *model.decoder.blocks)[0]
    plain = type(module.in_proj) is Projections and type(module.out_proj) is Linear
    return plain and module.inner_width == model.width and module.heads == first.attention.heads


def specification(model: Transformer, positions: int) -> Any:
    """CTranslate2's TransformerSpec with copies of a translator's weights, and `positions` position encodings.

    The weights are copied, because `TransformerSpec.optimize` scales them in place.
    """
    from ctranslate2.specs import TransformerSpec, common_spec

    blocks: tuple[Any, Any] = model.encoder.blocks, model.decoder.blocks
    first = (*blocks[0], *blocks[1])[0]
    activation = common_spec.Activation[ACTIVATIONS[type(first.feed_forward.activation)]]
    heads = first.attention.heads
    spec = TransformerSpec.from_config(tuple(map(len, blocks)), heads, pre_norm=False, activation=activation)
    spec.config.layer_norm_epsilon = first.residuals[0].norm.eps
    steps = torch.arange(positions, dtype=torch.float32) + model.positions.first
    table = sine(steps, model.width, layout=model.positions.layout)
    embedding = model.embedding if model.source_embedding is None else model.source_embedding
    for side, part, matrix in (
        (spec.encoder, spec.encoder.embeddings[0], embedding.weight),
        (spec.decoder, spec.decoder.embeddings, model.embedding.weight),
    ):
        part.weight = _array(matrix)
        side.scale_embeddings = model.scale != 1
        side.position_encodings.encodings = _array(table)
    for layer, block in zip(spec.encoder.layer, blocks[0], strict=True):
        _fill_block(layer, block)
    for layer, block in zip(spec.decoder.layer, blocks[1], strict=True):
        _fill_block(layer, block)
        _fill_cross_attention(layer.attention, block)
    weight, _ = model.output.matrix()
    spec.decoder.projection.weight = _array(weight)
    if model.output_bias is not None:
        spec.decoder.projection.bias = _array(model.output_bias)
    return spec


def _fill_block(layer: Any, block: Any) -> None:
    """Set the weights of self-attention and feed-forward, which encoder and decoder layers have."""
    _fill_linear(layer.self_attention.linear[0], block.attention.in_proj)
    _fill_linear(layer.self_attention.linear[1], block.attention.out_proj)
    _fill_norm(layer.self_attention.layer_norm, block.residuals[0].norm)
    _fill_linear(layer.ffn.linear_0, block.feed_forward.expand)
    _fill_linear(layer.ffn.linear_1, block.feed_forward.contract)
    _fill_norm(layer.ffn.layer_norm, block.residuals[-1].norm)


def _fill_cross_attention(part: Any, block: Any) -> None:
    attention = block.cross_attention
    width = attention.inner_width
    _fill_linear(part.linear[0], attention.in_proj, slice(None, width))  # queries
    _fill_linear(part.linear[1], attention.in_proj, slice(width, None))  # keys and values
    _fill_linear(part.linear[2], attention.out_proj)
    _fill_norm(part.layer_norm, block.residuals[1].norm)


def _fill_linear(part: Any, linear: Linear, rows: slice = slice(None)) -> None:
    weight, bias = linear.matrix()
    part.weight = _array(weight[rows])
    if bias is not None:
        part.bias = _array(bias[rows])


def _fill_norm(part: Any, norm: nn.Module) -> None:
    part.gamma, part.beta = (_array(getattr(norm, name)) for name in ("weight", "bias"))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().clone().float().numpy()


def entries(tokenizer: Any) -> list[str]:
    """The entries of a tokenizer's vocabulary in the order of their ids, as its exported file names them."""
    if hasattr(tokenizer, "entries"):  # imported ones
        return list(tokenizer.entries)
    vocabulary = tokenizer_files.library_vocabulary(tokenizer)
    return sorted(vocabulary, key=vocabulary.__getitem__)


def compare(contender: Contender) -> list[Comparison]:
    """Compare log probabilities of given targets with the model's, for the shapes in COMPARED_LENGTHS."""
    model, comparisons = contender.model, []
    for count, length, steps in COMPARED_LENGTHS:
        source, lengths, target = sample_sentences(model, count, min(length, model.longest), steps + 1)
        expected = model(source, lengths, target[:, :-1]).log_softmax(-1).gather(2, target[:, 1:, None])[..., 0]
        scored = contender.engine.score_batch(
            _words(source, lengths, contender.source), [[contender.target[i] for i in row[1:]] for row in target]
        )
        computed = torch.tensor([sentence.log_probs[:steps] for sentence in scored])
        inputs = f"{count} x {source.shape[1]} to {steps} tokens{', padded' if count > 1 else ''}"
        comparisons.append(Comparison(inputs, "log probabilities", relative_difference(computed, expected)))
    return comparisons


def _words(source: Tensor, lengths: Tensor, vocabulary: Sequence[str]) -> list[list[str]]:
    """Sources (B, S) with their lengths (B,) as lists of entries, without padding."""
    return [[vocabulary[i] for i in row[:length]] for row, length in zip(source, lengths, strict=True)]


def searches(contender: Contender) -> dict[str, tuple[Search, Search]]:
    """Greedy and beam search of the same sentences: name -> the model's and CTranslate2's, as token ids.

    Both end a search by the same rules, which are CTranslate2's.
    """
    model, options = contender.model, contender.options
    source, lengths, _ = sample_sentences(model, COUNT, min(SOURCE_LENGTH, model.longest), 1)
    words = _words(source, lengths, contender.source)
    ids = {entry: i for i, entry in enumerate(contender.target)}
    common = replace(options, candidates=1, beam=BEAM, penalty="average", alpha=1.0, stop="first", at_limit="cut")
    common = replace(common, longest_factor=0.0, longest_extra=NEW_TOKENS)

    def ours(method: Any) -> list[list[int]]:
        answers = decode(model, source, lengths, replace(common, method=method), SPECIAL)
        return [hypotheses[0].tokens for hypotheses in answers]

    def theirs(beam: int) -> list[list[int]]:
        excluded = [[contender.target[i]] for i in (PAD, BOS)]
        limits = {"min_decoding_length": 0, "max_decoding_length": NEW_TOKENS}
        results = contender.engine.translate_batch(
            words, beam_size=beam, length_penalty=1.0, suppress_sequences=excluded, **limits
        )
        return [[ids[entry] for entry in result.hypotheses[0]] for result in results]

    return {
        "greedy": (lambda: ours("greedy"), lambda: theirs(1)),
        f"beam {BEAM}": (lambda: ours("beam"), lambda: theirs(BEAM)),
    }


@torch.no_grad()
def timing_rows(pairs: dict[str, tuple[Search, Search]]) -> list[list[str]]:
    """The rows of a table: for each search, the number of equal translations, and milliseconds of both programs."""
    rows = [["search", "equal translations", "model", "CTranslate2"]]
    for name, pair in pairs.items():
        expected, computed = (search() for search in pair)
        equal = sum(a == b for a, b in zip(expected, computed, strict=True))
        times: tuple[list[float], list[float]] = [], []
        for _ in range(ROUNDS):
            for search, measured in zip(pair, times, strict=True):
                start = time.perf_counter()
                search()
                measured.append(1000 * (time.perf_counter() - start))
        rows.append([name, f"{equal} of {len(expected)}", *(f"{median(measured):.3g}" for measured in times)])
    return rows


def description(contenders: dict[Format, Contender]) -> dict[str, Any]:
    """What model.json says of the folders: how to call CTranslate2 with the tokens of the exported tokenizers."""
    target = next(iter(contenders.values())).target
    return {
        "folders": {form: COMPUTE_TYPES[form] for form in contenders},
        "reader": "ctranslate2.Translator(folder).translate_batch takes tokens that end with the end, and the options",
        "end": target[EOS],
        "options": {"min_decoding_length": 0, "suppress_sequences": [[target[i]] for i in (PAD, BOS)]},
    }
