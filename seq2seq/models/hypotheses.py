"""The decoding state of several hypotheses per sentence that share one key-value cache per sentence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.nn.blocks import BlockCache


@dataclass
class Hypotheses:
    """The state of decoding B sentences with W hypotheses each, all of the same length.

    The cache of a sentence holds the keys and values of all K tokens that were decoded for it, in one sequence. A token
    attends only to its ancestors: itself and the tokens before it in its hypothesis. Reordering hypotheses changes only
    `ancestors`; keys and values are copied only when sentences are removed or change their order.
    """

    caches: list[BlockCache]  # one for each block of the decoder
    ancestors: Tensor  # (B, W, K) boolean: which of its sentence's K tokens belong to each hypothesis
    tokens: int  # the number of tokens of each hypothesis, including the prompt
    sees_all: bool  # whether all K tokens are ancestors, so that no mask is needed

    def append(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Append a token to each hypothesis: (B * W,), or a prompt to each sentence's only hypothesis: (B, N).

        Returns the tokens (B, W) or (B, N), and the mask of their self-attention, boolean (B, 1, W or 1, K + W or
        K + N); the mask is None if they attend to all tokens. The tokens of a prompt attend causally to each other.
        """
        if tokens.ndim == 2:
            return self._append_prompts(tokens)
        tokens = tokens.view(self.ancestors.shape[0], -1)  # (B * W,) -> (B, W)
        count = tokens.shape[1]
        itself = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(tokens.shape[0], -1, -1)
        self.ancestors = torch.cat([self.ancestors, itself], dim=2)  # (B, W, K + W)
        self.tokens += 1
        self.sees_all = self.sees_all and count == 1
        return tokens, None if self.sees_all else self.ancestors[:, None]

    def _append_prompts(self, prompts: Tensor) -> tuple[Tensor, Tensor | None]:
        assert not self.tokens, "prompts are only for the first step"
        self.tokens = prompts.shape[1]
        tokens = self.ancestors.new_ones(prompts.shape[0], 1, self.tokens)
        self.ancestors = torch.cat([self.ancestors, tokens], dim=2)  # (B, 1, K + N)
        return prompts, None if self.sees_all else self.ancestors[:, None]

    def select(self, rows: Tensor) -> Tensor | None:
        """Select hypotheses in place, by their indices `rows` (B' * W',) in 0 .. B * W - 1.

        Returns the indices (B',) of the remaining sentences, for tensors with a row per sentence; None if all remain in
        the same order.
        """
        sentences: Tensor = (rows // self.ancestors.shape[1]).unique_consecutive()  # (B',)
        before = self.ancestors.shape[0]
        self.ancestors = self.ancestors.flatten(0, 1)[rows].unflatten(0, (len(sentences), -1))  # (B', W', K)
        if torch.equal(sentences, torch.arange(before, device=rows.device)):
            return None
        for cache in (cache for block in self.caches for cache in block):
            if cache is not None:
                cache.select(sentences)
        return sentences
