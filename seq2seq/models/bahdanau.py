"""The translator with additive attention of Bahdanau et al. 2015 (arXiv 1409.0473), RNNsearch."""

import torch
from torch import Tensor

from common.nn.padding import is_real
from common.nn.recurrent import CellName, Recurrent
from common.types import Fraction, Layers, Positive
from seq2seq.models.alignment import AdditiveAlignment
from seq2seq.models.deep_output import DeepOutput
from seq2seq.models.recurrent import Bridge, RecurrentTranslator, State, Tying, attend, run


class Bahdanau(RecurrentTranslator):
    """A bidirectional encoder, and a decoder that attends to the encoder's output BEFORE each of its steps.

    The annotation h_j = [forward state; backward state] knows the words on both sides of word j. The decoder begins
    with s_0 = tanh(W b_1), where b_1 is the backward state at the first word. The query of step i is its PREVIOUS state
    s_{i-1}; the context c_i is the weighted mean of the annotations; s_i is computed from s_{i-1}, the previous word
    and c_i; and the output layer sees s_i, the previous word and c_i (equation 4).

    Differs: GRUs are those of torch (`common.nn.recurrent.GruCell`); there may be several layers, of which the top one
    is the query and the lowest one gets the context. The paper samples matrices from N(0, 0.01^2) or N(0, 0.001^2) and
    begins with v = 0; ours are initialised by Xavier.
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
        attention_width: Positive,
        maxout_width: Positive,
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
            width: H, the width of the decoder, and of each direction of the encoder.
            layers: number of layers of the encoder, and of the decoder.
            attention_width: A, the hidden width of the network that compares a query and an annotation.
            maxout_width: number of maxout units of the output layer.
            dropout: rate of dropout on embeddings, between layers and on the output's inputs.
            tied: which of the source embedding, target embedding and output share one matrix: "all" (needs a joint
                vocabulary), "target" (target embedding and output), or "none". If any, `maxout_width` must equal
                `embedding_width`.
            longest: maximum number of source tokens, including EOS; it can be raised for a trained model.
            embedding_weights: see `RecurrentTranslator`.
        """
        super().__init__(
            vocabularies=vocabularies,
            joint=joint,
            embedding_width=embedding_width,
            features=maxout_width,
            dropout=dropout,
            tied=tied,
            longest=longest,
            embedding_weights=embedding_weights,
        )
        self.encoder = Recurrent(
            cell=cell, inputs=embedding_width, width=width, layers=layers, bidirectional=True, dropout=dropout
        )
        self.bridge = Bridge(cell, width, width, layers)
        self.cross_attention = AdditiveAlignment(width, 2 * width, attention_width)
        self.decoder = Recurrent(
            cell=cell, inputs=embedding_width + 2 * width, width=width, layers=layers, dropout=dropout
        )
        self.deep_output = DeepOutput(width, embedding_width, 2 * width, maxout_width)
        self._initialise()

    def begin(self, x: Tensor, lengths: Tensor) -> State:
        """See `RecurrentTranslator.begin`."""
        memory, finals = self.encoder(x, lengths)  # (B, S, 2 H)
        backward = finals[-1][0]  # the backward state at the first word, which that direction reads last
        keys = self.cross_attention.project(memory)
        return State(self.bridge(backward), memory=memory, keys=keys, real=is_real(lengths, x.shape[1]))

    def advance(self, state: State, x: Tensor) -> Tensor:
        """See `RecurrentTranslator.advance`."""
        outputs, contexts = [], []
        for word in x.split(1, 1):  # (R, 1, E)
            previous = state.hidden[-1][0][:, None]  # (R, 1, H)
            context = attend(self.cross_attention, state, previous).to(x.dtype)  # (R, 1, 2 H)
            outputs.append(run(self.decoder, state, torch.cat([word, context], -1))[:, 0])
            contexts.append(context[:, 0])
        features: Tensor = self.deep_output(torch.stack(outputs, 1), x, torch.stack(contexts, 1))
        return features
