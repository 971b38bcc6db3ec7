"""The translator with global attention of Luong et al. 2015 (arXiv 1508.04025, sections 3.1 and 3.3)."""

import torch
from torch import Tensor

from common.errors import UserError
from common.nn.linear import Linear
from common.nn.padding import is_real
from common.nn.recurrent import CellName, CellState, Recurrent, reverse_rows
from common.types import Fraction, Layers, Positive
from seq2seq.models.alignment import Score, luong_alignment
from seq2seq.models.recurrent import RecurrentTranslator, State, Tying, attend, run


class Luong(RecurrentTranslator):
    """A decoder that attends to the encoder's output AFTER each of its steps.

    The decoder begins with the last states of the encoder's layers. The query of step t is its NEW top state s_t; the
    context c_t is the weighted mean of the encoder's top outputs; and the attentional vector tanh(W [c_t; s_t])
    (equation 5) is the input of the output. With input feeding (section 3.3), the previous attentional vector, at first
    zeros, is fed to the next step beside the previous word. Without it, all steps of a known target are computed
    without waiting for attention.

    Differs: the cell may be a GRU, and the encoder may read in both directions, each of half the width. Local attention
    is not implemented.
    """

    def __init__(
        self,
        *,
        vocabularies: tuple[int, int],
        joint: bool,
        cell: CellName,
        embedding_width: Positive,
        width: Positive,
        layers: Layers,
        bidirectional: bool,
        reverse_source: bool,
        score: Score,
        input_feeding: bool,
        dropout: Fraction,
        tied: Tying,
        longest: Positive,
        embedding_weights: str | None,
    ):
        """Build the model; raises UserError for options that are not compatible.

        Args:
            vocabularies: number of entries of the source and of the target vocabulary, decided by the data.
            joint: whether source and target have the same vocabulary, decided by the data.
            cell: "gru" or "lstm".
            embedding_width: E, the width of embeddings.
            width: H, the width of the decoder, of the encoder's output, and of the attentional vector.
            layers: number of layers of the encoder, and of the decoder.
            bidirectional: whether the encoder reads in both directions; each has half the width, which must be even.
            reverse_source: whether the source is read from its end to its beginning, as in the paper.
            score: how a state s and an encoder's output h are compared: "dot" (s^T h), "general" (s^T W h) or "concat"
                (v^T tanh(W [s; h])).
            input_feeding: whether the previous attentional vector is an input of the next step.
            dropout: rate of dropout on embeddings, between layers and on the output's inputs.
            tied: which of the source embedding, target embedding and output share one matrix: "all" (needs a joint
                vocabulary), "target" (target embedding and output), or "none". If any, `width` must equal
                `embedding_width`.
            longest: maximum number of source tokens, including EOS; it can be raised for a trained model.
            embedding_weights: see `RecurrentTranslator`.
        """
        super().__init__(
            vocabularies=vocabularies,
            joint=joint,
            embedding_width=embedding_width,
            features=width,
            dropout=dropout,
            tied=tied,
            longest=longest,
            embedding_weights=embedding_weights,
        )
        if bidirectional and width % 2:
            raise UserError(f"model.width={width} must be even with model.bidirectional=true.")
        self.width, self.bidirectional, self.reverse_source = width, bidirectional, reverse_source
        self.input_feeding = input_feeding
        self.encoder = Recurrent(
            cell=cell,
            inputs=embedding_width,
            width=width // 2 if bidirectional else width,
            layers=layers,
            bidirectional=bidirectional,
            dropout=dropout,
        )
        inputs = embedding_width + width if input_feeding else embedding_width
        self.decoder = Recurrent(cell=cell, inputs=inputs, width=width, layers=layers, dropout=dropout)
        self.cross_attention = luong_alignment(score, width)
        self.combine = Linear(2 * width, width, bias=False)
        self._initialise()

    def begin(self, x: Tensor, lengths: Tensor) -> State:
        """See `RecurrentTranslator.begin`. The memory is in the order of the source, also if that is read reversed."""
        memory, finals = self.encoder(reverse_rows(x, lengths) if self.reverse_source else x, lengths)
        memory = reverse_rows(memory, lengths) if self.reverse_source else memory  # (B, S, H)
        hidden = _joined(finals) if self.bidirectional else finals
        attentional = x.new_zeros(x.shape[0], self.width) if self.input_feeding else None
        keys, real = self.cross_attention.project(memory), is_real(lengths, x.shape[1])
        return State(hidden, attentional=attentional, memory=memory, keys=keys, real=real)

    def advance(self, state: State, x: Tensor) -> Tensor:
        """See `RecurrentTranslator.advance`."""
        if not self.input_feeding:
            return self._attentional(state, run(self.decoder, state, x))
        vectors = []
        for word in x.split(1, 1):  # (R, 1, E)
            assert state.attentional is not None
            output = run(self.decoder, state, torch.cat([word, state.attentional[:, None]], -1))  # (R, 1, H)
            state.attentional = self._attentional(state, output)[:, 0]
            vectors.append(state.attentional)
        return torch.stack(vectors, 1)

    def _attentional(self, state: State, outputs: Tensor) -> Tensor:
        """The attentional vectors of the decoder's outputs: (R, N, H) -> (R, N, H)."""
        contexts = attend(self.cross_attention, state, outputs).to(outputs.dtype)
        vectors: Tensor = self.combine(torch.cat([contexts, outputs], -1)).tanh().to(outputs.dtype)
        return vectors


def _joined(finals: list[CellState]) -> list[CellState]:
    """Both directions of each layer side by side: states (B, H/2) of 2 L directions -> states (B, H) of L layers."""
    pairs = zip(finals[::2], finals[1::2], strict=True)
    return [tuple(torch.cat(parts, -1) for parts in zip(*pair, strict=True)) for pair in pairs]
