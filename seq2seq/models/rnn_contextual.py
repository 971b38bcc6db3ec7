"""The encoder-decoder of Cho et al. 2014 (arXiv 1406.1078): every step of the decoder sees a summary of the source."""

import torch
from torch import Tensor

from common.nn.linear import Linear
from common.nn.recurrent import CellName, Recurrent
from common.types import Fraction, Layers, Positive
from seq2seq.models.deep_output import DeepOutput
from seq2seq.models.recurrent import Bridge, RecurrentTranslator, State, Tying, run


class ContextualEncoderDecoder(RecurrentTranslator):
    """A bidirectional encoder whose last states become one context vector c, which is fed to each step of the decoder.

    c = tanh(V h), where h are the last forward and the last backward state of the encoder's top layer. The decoder
    begins with s_0 = tanh(V' c), reads the previous word and c, and the output layer sees the state, the previous word
    and c.

    Differs: the encoder reads the source in both directions, the paper's in one.
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
            width: H, the width of the decoder, of each direction of the encoder, and of the context.
            layers: number of layers of the encoder, and of the decoder.
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
        self.summary = Linear(2 * width, width)
        self.bridge = Bridge(cell, width, width, layers)
        self.decoder = Recurrent(cell=cell, inputs=embedding_width + width, width=width, layers=layers, dropout=dropout)
        self.deep_output = DeepOutput(width, embedding_width, width, maxout_width)
        self._initialise()

    def begin(self, x: Tensor, lengths: Tensor) -> State:
        """See `RecurrentTranslator.begin`."""
        _, finals = self.encoder(x, lengths)
        (forward, *_), (backward, *_) = finals[-2:]
        context = self.summary(torch.cat([forward, backward], -1)).tanh().to(x.dtype)  # (B, H)
        return State(self.bridge(context), context=context)

    def advance(self, state: State, x: Tensor) -> Tensor:
        """See `RecurrentTranslator.advance`."""
        assert state.context is not None
        context = state.context[:, None].expand(-1, x.shape[1], -1)  # (R, H) -> (R, N, H)
        outputs = run(self.decoder, state, torch.cat([x, context], -1))
        features: Tensor = self.deep_output(outputs, x, context)
        return features
