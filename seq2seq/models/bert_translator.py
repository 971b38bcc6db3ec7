"""A translator whose encoder is BERT's, so that it can start from a masked language model.

Rothe et al. 2020, "Leveraging Pre-trained Checkpoints for Sequence Generation Tasks", arXiv 1907.12461, with a decoder
that starts at random ("BERT2RND").
"""

from typing import Literal

from torch import Tensor

from common.errors import UserError
from common.types import Count, Layers, Positive
from seq2seq.models.bert import Embeddings, initialise
from seq2seq.models.transformer import PositionOptions, Transformer, TranslatorBlockOptions

CLASS_TOKENS = 1  # tokens of BERT before the first word, [CLS], which a source does not have


class BertTranslator(Transformer):
    """The Transformer with the embeddings and post-norm blocks of BERT as its encoder.

    The encoder's parameters have the names that they have in `Bert`, so a run with checkpoint=FILE of a masked language
    model loads them; the source is then cut into the tokens of that model. The decoder is that of `Transformer`.

    Differs: a source has no [CLS]. Its first token has the position of the first word in BERT.
    """

    decided_by_data = ("embedding", "output", "output_bias")  # the target's; the run has taken the source's tokenizer

    def __init__(
        self,
        *,
        vocabularies: tuple[int, int],
        joint: bool,
        width: Positive,
        heads: Positive,
        feedforward: Positive,
        encoder_layers: Layers,
        decoder_layers: Layers,
        tied: Literal["target", "none"],
        scaled: bool,
        output_bias: bool,
        longest: Positive,
        first_position: Count,
        token_types: Count,
        positions: PositionOptions,
        blocks: TranslatorBlockOptions,
    ):
        """Build the model; raises UserError for pre-norm blocks, and for options that are not compatible.

        Args:
            vocabularies: number of entries of the source and of the target vocabulary, decided by the data.
            joint: whether source and target have the same vocabulary, decided by the data; they have embeddings of
                their own even then.
            width: C, the width of embeddings and blocks; that of the masked language model.
            heads: number of heads of each attention; that of the masked language model.
            feedforward: hidden width of each feed-forward; that of the masked language model.
            encoder_layers: number of encoder blocks; that of the masked language model.
            decoder_layers: number of decoder blocks.
            tied: whether target embedding and output share one matrix ("target") or not ("none").
            scaled: whether the target's embeddings are multiplied by sqrt(C).
            output_bias: whether each entry's logit has a bias.
            longest: maximum number of source tokens, including EOS; one less than that of the masked language model.
            first_position: see `Bert`.
            token_types: see `Bert`.
            positions: the sine positions of the target.
            blocks: see TranslatorBlockOptions; the activation is "gelu" in BERT.
        """
        if blocks.pre_norm:
            raise UserError(
                "model.blocks.pre_norm=true: the encoder of a masked language model has post-norm blocks; give false."
            )
        super().__init__(
            vocabularies=vocabularies,
            joint=joint,
            width=width,
            heads=heads,
            feedforward=feedforward,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            tied=tied,
            scaled=scaled,
            output_bias=output_bias,
            longest=longest,
            positions=positions,
            blocks=blocks,
        )
        self.source_embedding = None
        self.embeddings = Embeddings(
            entries=vocabularies[0],
            width=width,
            positions=longest + CLASS_TOKENS,
            first_position=first_position,
            types=token_types,
            eps=blocks.norm_eps,
            dropout=blocks.dropout,
        )
        initialise(self.embeddings)
        initialise(self.encoder)

    def _embed_source(self, source: Tensor) -> Tensor:
        x: Tensor = self.embeddings(source, start=CLASS_TOKENS)
        return x
