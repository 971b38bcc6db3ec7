"""The encoder-decoder of Sutskever et al. 2014 (arXiv 1409.3215): the whole source becomes one state."""

from torch import Tensor

from common.nn.recurrent import CellName, Recurrent, reverse_rows
from common.types import Fraction, Layers, Positive
from seq2seq.models.recurrent import RecurrentTranslator, State, Tying, run


class EncoderDecoder(RecurrentTranslator):
    """Two stacks of recurrent layers. The last states of the encoder's layers are the first states of the decoder's.

    Everything that the decoder knows of the source is in these states, whose size does not depend on the length.

    Differs: the cell may be a GRU. The paper's model has 4 layers of LSTMs of width 1000, no dropout, and parameters
    from U(-0.08, 0.08).
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
        reverse_source: bool,
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
            width: H, the width of the cells' outputs.
            layers: number of layers of the encoder, and of the decoder.
            reverse_source: whether the source is read from its end to its beginning, which brings its first words next
                to the first words of the translation (section 3.3).
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
        self.reverse_source = reverse_source
        self.encoder = Recurrent(cell=cell, inputs=embedding_width, width=width, layers=layers, dropout=dropout)
        self.decoder = Recurrent(cell=cell, inputs=embedding_width, width=width, layers=layers, dropout=dropout)
        self._initialise()

    def begin(self, x: Tensor, lengths: Tensor) -> State:
        """See `RecurrentTranslator.begin`."""
        _, finals = self.encoder(reverse_rows(x, lengths) if self.reverse_source else x, lengths)
        return State(finals)

    def advance(self, state: State, x: Tensor) -> Tensor:
        """See `RecurrentTranslator.advance`."""
        return run(self.decoder, state, x)
