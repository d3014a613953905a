"""What each training row holds: the mixture of plain text and retrieval, of stretched and contiguous positions.

Row i of a run is a pure function of (config, corpus, i), so a resumed run needs no saved data position beyond its step
and a row is the same on one GPU or many. Shares are exact in every block of ten rows, because a demo trains on a dozen.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.data import Dataset

from lcconvert.convert.corpus import Corpus
from lcconvert.convert.extend_config import REPLAY_ROW, Stage
from lcconvert.convert.pose import pose_positions
from lcconvert.convert.retrieval import retrieval_reading, retrieval_sample
from lcconvert.runtime.tokenizer import Tokenizer

_BLOCK = 10

Row = dict[str, torch.Tensor]

_QUESTION = 512  # tokens that a question and its answer may take after a text that is read once


@dataclass(frozen=True)
class StageRows(Dataset[Row]):
    """The rows of one stage. A row is ids, positions, weights, each [T]; weights fp32 sum to 1 over the tokens whose
    prediction counts (weights[t] belongs to predicting ids[t], weights[0] is 0), so that a row with three answer
    tokens teaches as much as a row of plain text. replay, bool []: compared with the teacher instead, in short pieces.
    """

    stage: Stage
    corpus: Corpus
    tokenizer: Tokenizer
    context: int
    seed: int
    first_row: int  # rows of the stages before
    first_token: int  # tokens of the stages before

    def __len__(self) -> int:
        return self.stage.rows

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        stage, row = self.stage, self.first_row + index
        rng = random.Random(f"row/{self.seed}/{row}")
        start = self.first_token + index * stage.seq_len
        kind = self._kind(row)
        if kind == "retrieval":
            sample = retrieval_sample(self.tokenizer, self.corpus, start=start, length=stage.seq_len, rng=rng)
            ids, borders, counted = sample.ids, sample.borders, torch.tensor(sample.answers, dtype=torch.float32)
        else:
            ids, borders = self.corpus.window(start, stage.seq_len)
            counted = torch.ones(stage.seq_len)
        counted[0] = 0.0
        chunks = 1 if kind == "replay" or self._contiguous(row) else stage.pose_chunks
        positions = pose_positions(stage.seq_len, borders, self.context, chunks, rng)
        replay = torch.tensor(kind == "replay")
        return {"ids": torch.tensor(ids), "positions": positions, "weights": counted / counted.sum(), "replay": replay}

    def reading(self, step: int) -> tuple[torch.Tensor, list[Row]]:
        """For step `step` of a stage with questions: the ids of the text [S], and for every update a batch of rows, one
        a question, padded at the right; their positions follow the text's and are not given."""
        stage, row = self.stage, self.first_row + step
        rng = random.Random(f"reading/{self.seed}/{row}")
        reading = retrieval_reading(
            self.tokenizer,
            self.corpus,
            start=self.first_token + step * stage.seq_len,
            length=stage.seq_len - _QUESTION,
            questions=stage.questions,
            rng=rng,
        )
        asked = [turn for turn in reading.questions if len(turn[0]) <= _QUESTION]
        updates = [asked[i : i + stage.batch_size] for i in range(0, len(asked), stage.batch_size)]
        return torch.tensor(reading.ids), [_padded(update) for update in updates]

    def replay(self, step: int, update: int) -> Row:
        """The row of text that is compared with the teacher at an update of `reading(step)`."""
        start = self.first_token + step * self.stage.seq_len + update * REPLAY_ROW
        ids = torch.tensor(self.corpus.window(start, REPLAY_ROW)[0])[None]
        nothing = torch.zeros(ids.shape)
        return {"ids": ids, "positions": ids, "weights": nothing, "replay": torch.tensor([True])}

    def origins(self, step: int) -> list[str]:
        """The documents that the text of optimizer step `step` of this stage (from 0) was taken from."""
        tokens = self.stage.seq_len * (self.stage.rows // self.stage.steps)
        return self.corpus.origins(self.first_token + step * tokens, tokens)

    def _kind(self, row: int) -> Literal["retrieval", "replay", "text"]:
        place, retrieval = self._place(row, "retrieval"), _of_block(self.stage.retrieval_share)
        if place < retrieval:
            return "retrieval"
        return "replay" if place < retrieval + _of_block(self.stage.replay_share) else "text"

    def _contiguous(self, row: int) -> bool:
        return self._place(row, "contiguous") < _of_block(self.stage.contiguous_share)

    def _place(self, row: int, what: Literal["retrieval", "contiguous"]) -> int:
        """The rank of `row` in its block of ten, in an order drawn for `what`."""
        block, place = divmod(row, _BLOCK)
        return random.Random(f"{what}/{self.seed}/{block}").sample(range(_BLOCK), _BLOCK)[place]


def _padded(questions: list[tuple[list[int], list[bool]]]) -> Row:
    length = max(len(ids) for ids, _ in questions)
    ids = torch.zeros(len(questions), length, dtype=torch.int64)
    weights = torch.zeros(len(questions), length)
    for i, (tokens, answers) in enumerate(questions):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        weights[i, : len(tokens)] = torch.tensor(answers, dtype=torch.float32)
    weights /= weights.sum(1, keepdim=True)
    return {"ids": ids, "positions": ids, "weights": weights, "replay": torch.zeros(len(ids), dtype=torch.bool)}


def _of_block(share: float) -> int:
    """`share` of ten rows, rounded up."""
    return math.ceil(share * _BLOCK - 1e-9)
