"""Benchmarks of the base-size translator against CTranslate2, torch.nn.Transformer and transformers.

ROWS maps the names of the benchmarks to the functions that build them. Each scaling in SCALINGS repeats one benchmark
for several values of a property, such as the number of tokens per sentence.
"""

from scripts.benchmarks import seq2seq_decode, seq2seq_train
from scripts.benchmarks.scaling import Scaling, precision
from scripts.benchmarks.timing import Row, Setting

ROWS = {
    "greedy": seq2seq_decode.greedy,
    "beam": seq2seq_decode.beam,
    "forward": seq2seq_train.forward,
    "train": seq2seq_train.train,
    "throughput": seq2seq_train.throughput,
    "decoding": seq2seq_decode.decoding,
}
LENGTH = 25  # tokens per sentence


def _by_length(length: int, setting: Setting) -> Row:
    count = setting.batch_size(8, 64)
    return seq2seq_train.throughput_row(setting, count=count, length=length, precision=precision(setting.device))


def _by_tokens(tokens: int, setting: Setting) -> Row:
    return seq2seq_train.throughput_row(setting, count=tokens // LENGTH, precision=precision(setting.device))


def _by_beam(beam: int, setting: Setting) -> Row:
    dtype = precision(setting.device)
    return seq2seq_decode.search(setting, beam=beam).select([f"ours {dtype}", f"transformers {dtype}"])


SCALINGS = {
    "length": Scaling(
        name="tokens a sentence, training step", build=_by_length, values=(16, 32, 64, 128, 256), tiny=(4, 8)
    ),
    "tokens": Scaling(
        name="target tokens at once, training step",
        build=_by_tokens,
        values=(200, 400, 800, 1600, 3200),
        tiny=(50, 100),
        cuda=(800, 3200, 12800, 51200),
    ),
    "beam": Scaling(name="hypotheses of beam search", build=_by_beam, values=(1, 2, 4, 8), tiny=(1, 2)),
}
